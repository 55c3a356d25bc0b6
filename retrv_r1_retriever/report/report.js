"use strict";
(() => {
  const form = document.querySelector("form.filters");
  const count = form.querySelector("output");
  const nothing = document.querySelector(".nothing");
  const queries = [...document.querySelectorAll("section.query")];
  let texts = null; // made at the first search: a page may be large
  let pictures = null;

  const fits = (query, index, words) =>
    (!form.status.value || query.dataset.status === form.status.value) &&
    (!form.stop.value || query.dataset.stop === form.stop.value) &&
    (!form.change.value || query.dataset.change.split(" ").includes(form.change.value)) &&
    words.every((word) => texts[index].includes(word));

  const filter = () => {
    const words = form.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    if (words.length && !texts) texts = queries.map((query) => query.textContent.toLowerCase());
    let shown = 0;
    queries.forEach((query, index) => {
      query.hidden = !fits(query, index, words);
      shown += !query.hidden;
    });
    count.textContent = shown === queries.length ? `${shown} queries` : `${shown} of ${queries.length} queries`;
    nothing.hidden = shown > 0;
  };

  const show = (details) => {
    pictures ??= JSON.parse(document.getElementById("pictures").textContent);
    details.querySelectorAll("img[data-picture]").forEach((image) => {
      image.src = pictures[image.dataset.picture];
      image.removeAttribute("data-picture");
    });
  };

  const open = () => {
    const query = document.getElementById(location.hash.slice(1));
    if (query) query.querySelector("details").open = true;
  };

  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("toggle", (event) => event.target.open && show(event.target), true);
  window.addEventListener("hashchange", open);
  open();
  filter(); // a browser may have kept what was chosen before a reload
})();
