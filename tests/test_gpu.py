"""What must hold on a GPU, on a make-believe one."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch

from helpers.run import ROOT

WORDS = 12
DECODERS = ("greedy", "beam", "sample", "mmi", "blocks")
LAUNCHES = {"classic fp32": 125, "cornell fp32": 125}  # of an update, besides cuDNN's


def simulate() -> dict:
    """Train, evaluate and answer on the make-believe device: launches, calls of cuDNN and waits of each."""
    from benchmarks import bench
    from helpers import decoding
    from helpers.batches import BucketedSampler
    from helpers.deploy import BlockSearch
    from helpers.evaluation import evaluate, score
    from helpers.model import new_model
    from helpers.settings import load_profile
    from helpers.training import Trainer
    from tests import simulated  # first, and in a process of its own: it patches PyTorch

    found, bench.WORDS = {}, 200
    pairs, texts, vocabulary = bench.made_up_dialogue(192)

    def count(name, work, times=1):
        simulated.reset()
        results = [work() for _ in range(times)]
        kinds = {"launches": simulated.launches.total() / times, "cudnn": simulated.cudnn.total() / times}
        found[name] = kinds | {"waits": list(simulated.waits)}
        return results[-1]

    with simulated.Device():
        with pytest.raises(RuntimeError, match="tensors on both devices"):
            torch.ones(3, device=simulated.HERE) + torch.ones(3)
        count("looks", lambda: [bool(torch.ones(1, device="cuda") > 0), torch.ones(1).to("cuda").tolist()])
        there, batches = pairs.to(simulated.HERE), BucketedSampler(pairs, 64, 1).epoch(0)
        for name in ("classic", "cornell"):
            settings = load_profile(name).change(hidden_size=32, embedding_size=32, cuda_graphs=False)
            losses = {}
            for place, data in ((torch.device("cpu"), pairs), (simulated.HERE, there)):
                exact = settings.change(dropout=0.0, word_dropout=0.0, query_dropout=0.0)
                trainer = Trainer(new_model(exact, len(vocabulary)).to(place).train(), exact)
                losses[place.type] = [trainer.step(data, batches[n], n)["loss"] for n in range(2)]
            found[f"{name} losses"] = losses
            for precision in ("fp32", "bf16"):
                model = new_model(settings, len(vocabulary)).to(simulated.HERE).train()
                trainer = Trainer(model, settings, precision)
                trainer.launch(there, batches[0], 0)
                count(f"{name} {precision}", lambda trainer=trainer: trainer.launch(there, batches[1], 1), 2).row()
            model.eval()
            count(f"{name} evaluate", lambda model=model: evaluate(model, there))
            score(model, vocabulary, texts[:3])
            batch = there.batch(torch.arange(8))
            searches = {
                "greedy": decoding.greedy, "beam": decoding.beam_search, "sample": decoding.sample, "mmi": decoding.mmi,
                "blocks": lambda model, *given: BlockSearch(model, lambda work, example: work, 12, 4)(*given),
            }  # fmt: skip
            for kind, search in searches.items():
                count(f"{name} {kind}", partial(search, model, batch.query, batch.query_lengths, WORDS))
    return found


@pytest.fixture(scope="module")
def found():
    program = "import tests.simulated, json; from tests.test_gpu import simulate; print(json.dumps(simulate()))"
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr  # tensors of both devices in one operator are an error there
    return json.loads(done.stdout.splitlines()[-1])


def test_the_make_believe_device_sees_launches_and_waits(found):
    assert found["looks"]["launches"] == 2
    assert len(found["looks"]["waits"]) == 3, "a look, a copy there and one back"


@pytest.mark.parametrize("profile", ["classic", "cornell"])
def test_it_learns_there_what_it_learns_on_the_cpu(found, profile):
    losses = found[f"{profile} losses"]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-5)


@pytest.mark.parametrize("profile", ["classic", "cornell"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_update_never_makes_the_host_wait(found, profile, precision):
    assert found[f"{profile} {precision}"]["waits"] == []


@pytest.mark.parametrize("kind", LAUNCHES)
def test_an_update_has_few_launches(found, kind):
    assert found[kind]["launches"] <= LAUNCHES[kind]


@pytest.mark.parametrize("profile", ["classic", "cornell"])
def test_an_evaluation_waits_once(found, profile):
    assert len(found[f"{profile} evaluate"]["waits"]) <= 1


@pytest.mark.parametrize("profile", ["classic", "cornell"])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_waits_once_a_block_of_four_words_and_once_at_the_start(found, profile, kind):
    assert len(found[f"{profile} {kind}"]["waits"]) <= 1 + -(-WORDS // 4)
