import subprocess
import sys

import pytest

from helpers.settings import UserError
from helpers.tracking import Tracker


def test_off_does_nothing_and_does_not_import_wandb(tmp_path):
    program = (
        "import sys; from pathlib import Path; from helpers.tracking import Tracker\n"
        "t = Tracker('off', Path(sys.argv[1]), {}); t.log({'loss': 1.0}, 1); t.finish()\n"
        "assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    assert list(tmp_path.iterdir()) == []


def test_offline_writes_a_run_without_a_word(tmp_path, capfd):
    with Tracker("offline", tmp_path, {"seed": 1}, name="a", group="g") as tracker:
        for update in range(3):
            tracker.log({"loss": 1.0 / (update + 1)}, update)
        tracker.summary(best=0.5)
        folder = tracker.folder
    assert list(folder.glob("*.wandb"))
    out, err = capfd.readouterr()
    assert (out.strip(), err.strip()) == ("", "")


def test_an_unknown_mode_is_refused(tmp_path):
    with pytest.raises(UserError, match="offline"):
        Tracker("sometimes", tmp_path, {})
