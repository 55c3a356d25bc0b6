"""Tables and pictures into M-BEIR files: every format and place gives the same folder, nothing is guessed, bad rows are named."""

from __future__ import annotations

import csv
import io
import json
import random
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from PIL import Image
from retrv_r1_training import cli
from retrv_r1_training.convert import Table, convert_candidates, convert_queries
from retrv_r1_training.convert_output import Target
from retrv_r1_training.pictures import Pictures

from retrv_r1_retriever.errors import InputError, OptionsError
from retrv_r1_retriever.evaluation.mbeir import Dataset

pytest.importorskip("pyarrow")
fsspec = pytest.importorskip("fsspec")

COLUMNS = ("sku", "title", "brand", "photo")
ROWS = [
    ("a1", "Red shoe", "Ø", "shoes/a.png"),
    ("a2", 'Blue "boot",\nlarge', None, "b.png"),
    ("a3", None, "Z", "shoes/a.png"),
    ("a4", "Only words", "W", None),
]
MAP = {"id": "sku", "text": "{title} {brand}", "image": "photo"}


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = {"shoes/a.png": png("red"), "b.png": png("blue")}


def table(folder: Path, format: str, columns=COLUMNS, rows=ROWS, name="items") -> str:
    path = folder / f"{name}.{format}"
    if format == "jsonl":
        path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    elif format == "parquet":
        import pyarrow
        import pyarrow.parquet

        data = [dict(zip(columns, row, strict=True)) for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(data), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="," if format == "csv" else "\t")
            writer.writerows([columns, *rows])
    return str(path)


def pictures(folder: Path, kind: str) -> str:
    root = folder / "photos"
    for name, data in PICTURES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    if kind == "tar":
        with tarfile.open(folder / "photos.tar", "w") as archive:
            for path in [*root.rglob("*")]:
                archive.add(path, "./" + path.relative_to(root).as_posix(), recursive=False)
        return str(folder / "photos.tar")
    if kind == "fsspec":
        memory = fsspec.filesystem("memory")
        for name, data in PICTURES.items():
            memory.pipe(f"/bucket/photos/{name}", data)
        return "memory://bucket/photos"
    return str(root)


def candidates(tmp_path: Path, format="csv", kind="folder", *, rows=ROWS, share=0.01):
    out = tmp_path / "out"
    source = Table(table(tmp_path, format, rows=rows), MAP)
    target = Target(out, "shop", max_bad_share=share)
    return convert_candidates(source, target, Pictures(pictures(tmp_path, kind), out, "shop"), ["brand"])


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


@pytest.mark.parametrize(
    ("format", "kind"), [("csv", "folder"), ("tsv", "tar"), ("jsonl", "fsspec"), ("parquet", "tar")]
)
def test_every_format_and_place_gives_the_same_files(tmp_path, format, kind):
    report = candidates(tmp_path, format, kind)
    assert read(tmp_path / "out/cand_pool/local/mbeir_shop_cand_pool.jsonl") == [
        {"did": "100:a1", "txt": "Red shoe Ø", "img_path": "mbeir_images/shop/shoes/a.png", "modality": "image,text",
         "src_content": '{"brand": "Ø"}'},
        {"did": "100:a2", "txt": 'Blue "boot",\nlarge', "img_path": "mbeir_images/shop/b.png", "modality": "image,text",
         "src_content": '{"brand": null}'},
        {"did": "100:a3", "txt": "Z", "img_path": "mbeir_images/shop/shoes/a.png", "modality": "image,text",
         "src_content": '{"brand": "Z"}'},
        {"did": "100:a4", "txt": "Only words W", "img_path": None, "modality": "text", "src_content": '{"brand": "W"}'},
    ]  # fmt: skip
    for name, data in PICTURES.items():
        assert (tmp_path / "out/mbeir_images/shop" / name).read_bytes() == data
    assert (report.written, report.skipped.count, report.skipped.total) == (4, 0, 4)
    assert report.notes == {"candidates of modality image,text": 3, "candidates of modality text": 1}


def test_pictures_inside_a_parquet_table(tmp_path):
    rows = [("x/1", PICTURES["b.png"]), ("2", None)]
    source = table(tmp_path, "parquet", ("id", "image"), rows)
    wrapped = [("3", {"bytes": PICTURES["b.png"], "path": "b.png"})]
    other = table(tmp_path, "parquet", ("id", "image"), wrapped, "wrapped")
    out = tmp_path / "out"
    mapping = {"id": "id", "image": "image"}
    target = Target(out, "p", overwrite=True, max_bad_share=0.5)
    convert_candidates(Table(source, mapping), target, Pictures(None, out, "p"))
    assert (out / read(target.pool)[0]["img_path"]).read_bytes() == PICTURES["b.png"]
    assert read(target.pool)[0]["img_path"] == "mbeir_images/p/x%2F1.png"
    convert_candidates(Table(other, mapping), target, Pictures(None, out, "p"))
    assert (out / read(target.pool)[0]["img_path"]).read_bytes() == PICTURES["b.png"]


def test_pictures_below_the_output_stay_where_they_are(tmp_path):
    where = pictures(tmp_path, "folder")
    source = Table(table(tmp_path, "csv", rows=[("a", "t", "", str(Path(where, "b.png")))]), MAP)
    convert_candidates(source, Target(tmp_path, "shop"), Pictures(where, tmp_path, "shop"))
    assert read(tmp_path / "cand_pool/local/mbeir_shop_cand_pool.jsonl")[0]["img_path"] == "photos/b.png"
    assert not (tmp_path / "mbeir_images").exists()


BAD = [
    ("", "no id", "", ""),
    ("two words", "t", "", ""),
    ("e1", "", "", ""),
    ("e2", "gone", "", "gone.png"),
    ("e3", "outside", "", "../items.csv"),
    ("e4", "no picture", "", "text.png"),
    ("a1", "again", "", ""),
]


@pytest.mark.parametrize("kind", ["folder", "tar", "fsspec"])
def test_bad_rows_are_named_counted_and_left_out(tmp_path, kind):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/text.png").write_text("no picture")
    if kind == "fsspec":
        fsspec.filesystem("memory").pipe("/bucket/photos/text.png", b"no picture")
    report = candidates(tmp_path, "csv", kind, rows=[*ROWS, *BAD], share=0.9)
    assert report.written == 4
    assert (report.skipped.count, report.skipped.total) == (7, 11)
    lines = (tmp_path / "out/skipped/mbeir_shop_cand_pool.txt").read_text().splitlines()
    # Line 3 of the file is inside a quoted cell, so the fifth row stands on line 7.
    assert [line.split(": ")[0] for line in sorted(lines)] == sorted(f"items.csv:{n}" for n in range(7, 14))
    words = ("expected an id without spaces, got None", "got 'two words'", "expected a text, an image or both",
             "image gone.png: expected a picture in", "image ../items.csv: expected a path below", "expected a PNG, JPEG",
             "id '100:a1' a second time")  # fmt: skip
    for line, word in zip(sorted(lines, key=lambda line: int(line.split(":")[1])), words, strict=True):
        assert word in line


def test_too_many_bad_rows_leave_no_files(tmp_path):
    with pytest.raises(
        InputError, match=r"expected at most 1\.0% bad rows, got 1 of 5; items\.csv:7: id: expected an id"
    ):
        candidates(tmp_path, rows=[*ROWS, BAD[0]])
    assert [p.name for p in (tmp_path / "out").rglob("*.*") if p.suffix != ".png"] == ["mbeir_shop_cand_pool.txt"]


def test_a_csv_that_is_damaged_in_places(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b'id,text\n1,ok\n2,too,many\n3,\xff\n4,"x"y\n5,fine\n')
    target = Target(tmp_path / "out", "x", max_bad_share=0.9)
    report = convert_candidates(Table(str(path), {"id": "id", "text": "text"}), target)
    assert [row["did"] for row in read(target.pool)] == ["100:1", "100:5"]
    assert [line.split(": ")[0] for line in report.skipped.examples] == ["x.csv:3", "x.csv:4", "x.csv:5"]


TEXT = {"id": "id", "text": "text"}


@pytest.mark.parametrize(
    ("quotes", "bad", "reason"),
    [
        ([200], 201, "unexpected end of data after 201 lines"),
        ([200, 300], 101, "',' expected after '\"' after 101 lines"),
    ],
    ids=["never closed", "closed by another stray one"],
)
def test_rows_that_a_stray_quote_swallows_are_bad_rows(tmp_path, quotes, bad, reason):
    path = tmp_path / "x.csv"
    path.write_text("id,text\n" + "".join(f'{n},"{n} inch\n' if n + 1 in quotes else f"{n},t\n" for n in range(400)))
    target = Target(tmp_path / "out", "x")
    with pytest.raises(InputError, match=rf"got {bad} of 400; x\.csv:201: row: expected CSV, got {reason}"):
        convert_candidates(Table(str(path), TEXT), target)
    assert not target.pool.exists()


def test_cells_too_many_over_several_lines_count_as_so_many_rows(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('id,text,more\n1,a,b\n2,c,"d\n3,e,f\n4,"g",h\n5,i,"j\nk"\n')
    target = Target(tmp_path / "out", "x", max_bad_share=0.9)
    report = convert_candidates(Table(str(path), TEXT), target)
    assert [row["did"] for row in read(target.pool)] == ["100:1", "100:5"]
    assert (report.skipped.count, report.skipped.total) == (3, 5)


def test_a_csv_header_whose_quote_is_never_closed_is_named(tmp_path):
    (tmp_path / "x.csv").write_text('id,"text\n1,a\n')
    with pytest.raises(InputError, match=r"x\.csv:1: expected names of columns, got unexpected end of data"):
        convert_candidates(Table(str(tmp_path / "x.csv"), TEXT), Target(tmp_path / "out", "x"))


@pytest.mark.parametrize("format", ["csv", "parquet", "jsonl"])
def test_a_table_without_rows_makes_no_pool(tmp_path, format):
    path = tmp_path / f"x.{format}"
    if format == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"id": [], "text": []}), path)
    else:
        path.write_text("id,text\n" if format == "csv" else "")
    target = Target(tmp_path / "out", "x", max_bad_share=1.0)
    with pytest.raises(InputError, match=r"expected rows, got none|expected one of \[\], got none"):
        convert_candidates(Table(str(path), TEXT), target)
    assert not target.pool.exists()


def test_half_a_surrogate_pair_is_a_bad_row(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": 1, "text": "ok"}\n{"id": 2, "text": "\\ud800"}\n{"id": 3, "text": "\\ud83d\\ude00"}\n')
    target = Target(tmp_path / "out", "x", max_bad_share=0.9)
    report = convert_candidates(Table(str(path), TEXT), target)
    assert [row["txt"] for row in read(target.pool)] == ["ok", "\N{GRINNING FACE}"]
    assert "x.jsonl:2: " in report.skipped.examples[0]
    assert "surrogates not allowed" in report.skipped.examples[0]


@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet"])
def test_a_column_that_is_not_there_is_an_error_not_a_guess(tmp_path, format):
    source = Table(table(tmp_path, format), {"id": "sku", "text": "Title"})
    with pytest.raises(
        InputError, match=r"column 'Title': expected one of \['sku', 'title', 'brand', 'photo'\], got none"
    ):
        convert_candidates(source, Target(tmp_path / "out", "x", max_bad_share=1.0))
    assert not (tmp_path / "out/cand_pool/local/mbeir_x_cand_pool.jsonl").exists()


def test_a_column_that_is_there_twice_is_an_error_not_a_choice(tmp_path):
    (tmp_path / "x.csv").write_text("id,text,text,other,other\n1,a,b,c,d\n")
    target = Target(tmp_path / "out", "x")
    with pytest.raises(InputError, match="column 'text': expected one of that name, got several"):
        convert_candidates(Table(str(tmp_path / "x.csv"), {"id": "id", "text": "text"}), target)


def test_tables_are_read_in_memory_that_does_not_grow_with_them(tmp_path):
    peaks = []
    for count in (500, 2500):
        path = tmp_path / f"{count}.csv"
        path.write_text("id,text\n" + "".join(f"{n},{'word ' * 40}\n" for n in range(count)))
        tracemalloc.start()
        report = convert_candidates(
            Table(str(path), {"id": "id", "text": "text"}), Target(tmp_path / f"out{count}", "x")
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert report.written == count
    assert peaks[1] < 1.3 * peaks[0], peaks


def test_mistakes_in_the_call_are_named(tmp_path):
    path, target = table(tmp_path, "csv"), Target(tmp_path / "out", "x")
    for mapping, message in (({"id": "sku", "txt": "title"}, "expected one of id, text, image, got txt"),
                             ({"text": "title"}, "expected a column for 'id', got none. Add --map id=COLUMN")):  # fmt: skip
        with pytest.raises(OptionsError, match=message):
            convert_candidates(Table(path, mapping), target)
    with pytest.raises(InputError, match=r"format of .*items\.txt: expected one of parquet, csv, tsv, jsonl, got txt"):
        convert_candidates(Table(path.replace(".csv", ".txt"), {"id": "sku"}), target)
    with pytest.raises(InputError, match=r"expected the pool, got no such file\. Convert the candidates first"):
        convert_queries(Table(path, {"id": "sku", "positives": "brand"}), target, "train")
    candidates(tmp_path)
    with pytest.raises(InputError, match=r"expected no such file yet, got one\. Pass --overwrite"):
        candidates(tmp_path)
    for wrong, message in (({"max_bad_share": -1.0}, "a share, 0 to 1, got -1"), ({"max_bad_share": float("nan")}, "got nan"),
                           ({"dataset_id": -5}, "0 or more, got -5"), ({"name": "../x"}, "got '../x'")):  # fmt: skip
        with pytest.raises(OptionsError, match=message):
            Target(**{"out": tmp_path, "name": "x", **wrong})
    for split in ("../../x", "..", ".", "", "a/b"):
        with pytest.raises(OptionsError, match="--split: expected letters, digits, - and _"):
            convert_queries(Table(path, {"id": "sku", "positives": "brand"}), Target(tmp_path / "out", "shop"), split)
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b nonsense")
    with pytest.raises(InputError, match="expected a tar file"):
        Pictures(str(tmp_path / "x.tar"), tmp_path, "x")


QUERIES = ("qid", "words", "right", "grade")


def test_queries_with_graded_positives(tmp_path):
    candidates(tmp_path)
    target = Target(tmp_path / "out", "shop", max_bad_share=0.5)
    rows = [("1", "red", "a1|a3", "1|3"), ("2", "boot", "a2|lost", "1|1"), ("3", "hat", "", ""), ("4", "x", "lost", "1"),
            ("5", "x", "a1|a2", "1"), ("6", "x", "a1", "good")]  # fmt: skip
    source = Table(table(tmp_path, "csv", QUERIES, rows), {"id": "qid", "text": "words", "positives": "right", "grades": "grade"},
                   separator="|")  # fmt: skip
    report = convert_queries(source, target, "train")
    assert report.skipped.count == 3
    assert report.notes == {
        "queries with several positives": 1,
        "queries without a positive (they train <|none|>)": 1,
        "judged candidates outside the pool (left out)": 2,
    }
    made = read(target.queries("train"))
    assert [(row["qid"], row["pos_cand_list"], row["task_id"]) for row in made] == [
        ("100:1", ["100:a3", "100:a1"], 2), ("100:2", ["100:a2"], 2), ("100:3", [], -1),
    ]  # fmt: skip
    assert target.qrels("train").read_text() == "100:1 0 100:a3 3 2\n100:1 0 100:a1 1 2\n100:2 0 100:a2 1 2\n"
    data = Dataset.open(target.out, "query/train/mbeir_shop_train.jsonl", "cand_pool/local/mbeir_shop_cand_pool.jsonl",
                        qrels="qrels/train/mbeir_shop_train_qrels.txt")  # fmt: skip
    assert data.query(0, random.Random(0)).grades == {"100:a3": 3, "100:a1": 1}


def test_judgements_in_a_table_of_their_own(tmp_path):
    candidates(tmp_path)
    target = Target(tmp_path / "out", "shop")
    judged = table(
        tmp_path, "parquet", ("q", "d", "g"), [(2, "a1", 0), (1, "a2", 1), (2, "a4", 2), (2, "a3", 1)], "judged"
    )
    source = Table(
        table(tmp_path, "parquet", ("q", "words"), [(1, "boot"), (2, "z")], "q"), {"id": "q", "text": "words"}
    )
    judgements = Table(judged, {"query": "q", "candidate": "d", "grade": "g"})
    convert_queries(source, target, "test", judgements=judgements)
    made = read(target.queries("test"))
    assert [(row["pos_cand_list"], row["neg_cand_list"], row["task_id"]) for row in made] == [
        (["100:a2"], [], 2), (["100:a4", "100:a3"], ["100:a1"], 1),
    ]  # fmt: skip


def judged(tmp_path, words: list, judgements: list, share=0.01):
    """Queries of these ids and words, judged by a table of (query, candidate, grade)."""
    candidates(tmp_path)
    target = Target(tmp_path / "out", "shop", max_bad_share=share)
    queries = Table(table(tmp_path, "csv", ("id", "words"), words, "q"), {"id": "id", "text": "words"})
    source = table(tmp_path, "csv", ("q", "d", "g"), judgements, "judged")
    return target, convert_queries(
        queries, target, "test", judgements=Table(source, {"query": "q", "candidate": "d", "grade": "g"})
    )


def test_many_judgements_do_not_hide_bad_queries(tmp_path):
    with pytest.raises(InputError, match=r"got 9 of 10; q\.csv:3"):
        judged(tmp_path, [(n, "" if n else "red") for n in range(10)], [(n % 10, "a1", 1) for n in range(2000)])


def test_judgements_of_other_queries_are_counted_and_must_not_be_all(tmp_path):
    words = [(f"q{n}", "red") for n in range(10)]
    others = [(n, "a1", 1) for n in range(10)]
    with pytest.raises(InputError, match=r"judged\.csv: expected .*q\.csv, got 10 of others, such as '9'"):
        judged(tmp_path, words, others)
    assert not (tmp_path / "out/query/test/mbeir_shop_test.jsonl").exists()
    (tmp_path / "again").mkdir()
    _, report = judged(tmp_path / "again", words, [*others, ("q0", "a1", 1)])
    assert report.notes["judgements of other queries (left out)"] == 10
    assert report.notes["queries without a positive (they train <|none|>)"] == 9
    assert report.judgements.count == 0


def test_judgements_of_a_query_that_is_left_out_are_no_bad_rows(tmp_path):
    words = [("q0", ""), *((f"q{n}", "red") for n in range(1, 100))]
    _, report = judged(tmp_path, words, [("q0" if n % 2 else f"q{n}", "a1", 1) for n in range(2, 100)])
    assert (report.skipped.count, report.skipped.total) == (1, 100)
    assert (report.judgements.count, report.judgements.total) == (0, 98)


def test_a_bad_judgement_is_counted_apart_and_listed(tmp_path):
    rows = [("1", "a1", "1"), ("1", "a2", "123456789012345678901"), ("1", "a3", "good"), ("2", "a3", "1")]
    target, report = judged(tmp_path, [(1, "red")], rows, share=0.9)
    assert (report.skipped.count, report.skipped.total) == (0, 1)
    assert (report.judgements.count, report.judgements.total) == (2, 4)
    listed = (target.out / "skipped/mbeir_shop_test.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == ["judged.csv:3", "judged.csv:4"]
    assert "grade: expected a whole number of up to 15 digits, got '123456789012345678901'" in listed[0]
    assert report.files[-1].name == "mbeir_shop_test.txt"


def test_command_line(tmp_path, capsys):
    where = pictures(tmp_path, "folder")
    common = ["--out", str(tmp_path / "out"), "--name", "shop", "--dataset-id", "55"]
    items = ["convert", table(tmp_path, "csv"), "--rows", "candidates", "--map", "id=sku", "--map", "image=photo",
             "--map", "text=title", "--images", where, *common]  # fmt: skip
    assert cli.main(items) == 0
    assert "4 rows written, 0 of 4 input rows skipped" in capsys.readouterr().out
    assert cli.main(items) == 1
    assert "Pass --overwrite" in capsys.readouterr().err
    queries = ["convert", table(tmp_path, "jsonl", ("id", "words", "hits"), [("1", "red", ["a1"])], "q"), *common,
               "--rows", "queries", "--split", "train", "--map", "id=id", "--map", "text=words", "--map", "positives=hits",
               "--instruction", "text -> image,text: Find it.", "--instruction", "text->image,text: Which one?"]  # fmt: skip
    assert cli.main(queries) == 0
    assert cli.main([*queries, "--overwrite"]) == 0
    table_lines = (tmp_path / "out/instructions/query_instructions.tsv").read_text().splitlines()
    assert table_lines[1:] == ["text\timage,text\tshop\t55\tFind it.\tWhich one?"]
    for wrong, message in (
        ([*items, "--split", "train"], "--split: expected none with --rows candidates"),
        ([*items[:-6], "--map", "id=x", *common], "expected FIELD=COLUMN, got 'id=x'. Give every field once"),
        ([*queries, "--instruction", "Find it."], "--instruction: expected"),
    ):
        assert cli.main([*wrong, "--overwrite"]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*items, "--workers", "0"])
    assert "--workers: expected a whole number of at least 1, got '0'" in capsys.readouterr().err
