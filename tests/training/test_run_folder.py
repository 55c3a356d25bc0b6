"""A run's folder: whole states."""

from __future__ import annotations

from retrv_r1_training.run_folder import last_state


def state(run, number, text='{"global_step": 1}'):
    folder = run / f"checkpoint-{number}"
    folder.mkdir(parents=True)
    if text is not None:
        (folder / "trainer_state.json").write_text(text)
    return str(folder)


def test_the_last_whole_state_is_gone_on_from(tmp_path, caplog):
    assert last_state(tmp_path / "nowhere") is None
    whole = state(tmp_path, 9)
    state(tmp_path, 10, None)
    state(tmp_path, 11, '{"global_st')
    state(tmp_path, "best")
    with caplog.at_level("INFO"):
        assert last_state(tmp_path) == whole
    said = [record.getMessage() for record in caplog.records]
    assert ["checkpoint-11 is not whole" in said[0], "checkpoint-10 is not whole" in said[1]] == [True, True]
    assert said[2] == f"going on from {whole}"


def test_no_whole_state_is_the_beginning_and_is_said(tmp_path, caplog):
    state(tmp_path, 10, None)
    assert last_state(tmp_path) is None
    assert "starting from the beginning" in caplog.text
