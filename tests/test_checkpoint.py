import dataclasses
import pickle

import pytest
import torch

from helpers.run import Run
from helpers.settings import UserError
from helpers.training import FORMAT, Checkpoint, load_model
from tests.conftest import CPU

NOT_OURS = r"checkpoint\.pt .*not a (checkpoint|file of this project)"


def test_a_model_comes_back_as_it_was_saved(trained, prepared):
    state = Checkpoint.load(trained.checkpoint)
    model, vocabulary, settings, _ = load_model(trained.checkpoint, CPU)
    assert not model.training
    assert vocabulary.words == prepared.vocabulary.words
    assert settings.to_dict() == state.settings
    assert list(model.state_dict()) == list(state.best_model)
    assert all(torch.equal(tensor, state.best_model[name]) for name, tensor in model.state_dict().items())


class Evil:
    def __reduce__(self):
        return (print, ("this code ran",))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps(Evil())])
def test_what_is_no_checkpoint_is_refused_in_a_sentence(tmp_path, content, capsys):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be loaded"):
        Checkpoint.load(path)
    assert "ran" not in capsys.readouterr().out


def test_a_pickle_inside_torchs_own_format_cannot_run_code(tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": Evil()}, path)
    with pytest.raises(UserError):
        Checkpoint.load(path)
    assert "ran" not in capsys.readouterr().out


def test_missing_cut_short_and_foreign_checkpoints(tmp_path, trained):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(UserError, match="03_training"):
        Checkpoint.load(path)
    path.write_bytes(trained.checkpoint.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot be loaded"):
        Checkpoint.load(path)
    for foreign in ({"weights": torch.ones(2)}, {}):
        torch.save(foreign, path)
        with pytest.raises(UserError, match=NOT_OURS):
            Checkpoint.load(path)


def test_another_format_and_parts_missing_added_or_of_another_kind_are_refused(tmp_path, trained):
    path, whole = tmp_path / "checkpoint.pt", torch.load(trained.checkpoint, weights_only=True)
    names = [field.name for field in dataclasses.fields(Checkpoint)]
    assert sorted(whole) == sorted([*names, "format"])
    others = [whole | {"format": FORMAT - 1}, whole | {"format": str(FORMAT)}, whole | {"more": 1}]
    others += [{name: value for name, value in whole.items() if name != missing} for missing in whole]
    others += [whole | {name: None} for name in names]
    for other in others:
        torch.save(other, path)
        with pytest.raises(UserError, match=NOT_OURS):
            Checkpoint.load(path)
    torch.save(whole, path)
    assert Checkpoint.load(path).digest == whole["digest"]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, trained, monkeypatch):
    run = Run(tmp_path)
    state = Checkpoint.load(trained.checkpoint)
    state.save(run.checkpoint)
    before = run.checkpoint.read_bytes()

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(UserError, match="No space left"):
        state.save(run.checkpoint)
    assert run.checkpoint.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
