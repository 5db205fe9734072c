import pickle

import pytest
import torch

from helpers import checkpoint
from helpers.checkpoint import load_model
from helpers.run import Run
from helpers.settings import UserError
from tests.conftest import CPU


def test_a_model_comes_back_as_it_was_saved(trained, prepared):
    state = checkpoint.load(trained.checkpoint)
    model, vocabulary, settings = load_model(trained.checkpoint, CPU)
    assert not model.training
    assert vocabulary.words == prepared.vocabulary.words
    assert settings.to_dict() == state["settings"]
    assert all(torch.equal(tensor, state["best_model"][name]) for name, tensor in model.state_dict().items())


class Evil:
    def __reduce__(self):
        return (print, ("this code ran",))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps(Evil())])
def test_what_is_no_checkpoint_is_refused_in_a_sentence(tmp_path, content, capsys):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be loaded"):
        checkpoint.load(path)
    assert "ran" not in capsys.readouterr().out


def test_a_pickle_inside_torchs_own_format_cannot_run_code(tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": Evil()}, path)
    with pytest.raises(UserError):
        checkpoint.load(path)
    assert "ran" not in capsys.readouterr().out


def test_missing_cut_short_and_foreign_checkpoints(tmp_path, trained):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(UserError, match="03_training"):
        checkpoint.load(path)
    path.write_bytes(trained.checkpoint.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot be loaded"):
        checkpoint.load(path)
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        checkpoint.load(path)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, trained, monkeypatch):
    run = Run(tmp_path)
    state = checkpoint.load(trained.checkpoint)
    checkpoint.save(run.checkpoint, state)
    before = run.checkpoint.read_bytes()

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save(run.checkpoint, state)
    assert run.checkpoint.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
