"""Whose folder it is: a run goes on in its own, also where a later version knows more flags."""

import json
import logging

import pytest

from train.run.folder import RunFolder


def test_a_flag_that_a_run_did_not_know_was_its_default(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"status": "running", "flags": {"beta": 0.1}}))
    defaults = {"beta": 0.5, "truncate_prompt": "keep_end"}
    flags = {"beta": 0.1, "truncate_prompt": "keep_end"}
    assert not RunFolder(tmp_path, flags, defaults=defaults).finished
    changed = {"beta": 0.1, "truncate_prompt": "keep_system_and_end"}
    with pytest.raises(ValueError, match="truncate_prompt was 'keep_end'"):
        RunFolder(tmp_path, changed, defaults=defaults)
    assert not RunFolder(tmp_path, changed, {"truncate_prompt"}, defaults).finished


@pytest.mark.parametrize("name", ["$SCRATCH/run", "runs/${USER}-1"])
def test_a_variable_that_no_shell_has_replaced(tmp_path, monkeypatch, name):
    """As in a recipe: no folder of that name is made."""
    monkeypatch.chdir(tmp_path)
    variable = name.partition("$")[2].strip("{").split("/")[0].split("}")[0]
    with pytest.raises(ValueError, match=rf"\$.?{variable}.? is a variable.*write the folder out"):
        RunFolder(name, {})
    assert not list(tmp_path.iterdir())
    assert RunFolder("a$", {}).path.is_dir()


def test_warnings_reach_the_terminal(tmp_path, capsys, monkeypatch):
    """A log is read when something has gone wrong: until then a reward read at another token, or layers
    that stay uncompiled, would be nobody's business.
    """
    monkeypatch.setattr(logging.getLogger("zeropref"), "handlers", [])
    folder = RunFolder(tmp_path, {})
    log = logging.getLogger("zeropref")
    log.info("of no interest")
    log.warning("%s reads another token", "this model")
    try:
        raise OSError("unreachable")
    except OSError:
        log.warning("a tracker", exc_info=True)
    assert capsys.readouterr().out == "warning: this model reads another token\n"
    folder.say("so many rows")
    assert capsys.readouterr().out == "so many rows\n"
    written = (tmp_path / "logs/rank-0.log").read_text()
    assert all(word in written for word in ("no interest", "another token", "unreachable"))
