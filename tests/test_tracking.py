import subprocess
import sys

import pytest

from helpers.settings import UserError
from helpers.tracking import Tracker, create_sweep, logged_in, run_agent


def test_off_does_nothing_and_does_not_import_wandb(tmp_path):
    program = (
        "import sys; from pathlib import Path; from helpers.tracking import Tracker\n"
        "with Tracker('off', Path(sys.argv[1]), {}) as t: t.log({'loss': 1.0}, 1)\n"
        "assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    assert list(tmp_path.iterdir()) == []


def test_offline_writes_a_run_without_a_word(tmp_path, capfd):
    with Tracker("offline", tmp_path, {"seed": 1}, name="a", group="g") as tracker:
        for update in range(3):
            tracker.log({"loss": 1.0 / (update + 1)}, update)
        tracker.summary(best=0.5)
    assert list(tmp_path.rglob("*.wandb"))
    out, err = capfd.readouterr()
    assert (out.strip(), err.strip()) == ("", "")


def test_an_unknown_mode_is_refused(tmp_path):
    with pytest.raises(UserError, match="offline"):
        Tracker("sometimes", tmp_path, {})


@pytest.fixture
def no_account(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_a_login_is_found_where_wandb_writes_it(no_account, monkeypatch):
    assert not logged_in()
    no_account.write_text("machine elsewhere\n  login user\n  password secret\n")
    no_account.chmod(0o600)
    assert not logged_in()
    no_account.write_text("machine localhost:9\n  login user\n  password secret\n")
    assert logged_in()
    no_account.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert logged_in()


def test_an_online_sweep_without_an_account_says_what_to_do(no_account, tmp_path):
    spec = {"method": "random", "metric": {"name": "x"}, "parameters": {"clip": {"values": [1]}}}
    with pytest.raises(UserError, match="wandb login"):
        create_sweep(spec)
    with pytest.raises(UserError, match="agent of sweep abc"):
        run_agent("abc", tmp_path)
