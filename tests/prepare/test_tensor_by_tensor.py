"""Methods without text: any architecture, any number of processes, killed at any moment: the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import Checkpoints, contents
from transformers import AutoConfig, AutoModelForCausalLM

import bitwright
from bitwright.checkpoint import merge
from bitwright.checkpoint.reader import Checkpoint
from bitwright.core import machine, panels
from bitwright.core.decisions import LinearDecision
from bitwright.core.errors import RecipeError, SchemeError, UserError
from bitwright.core.method import WeightContext
from bitwright.core.progress import Progress
from bitwright.core.recipe import Recipe
from bitwright.core.settings import Settings
from bitwright.methods import rtn
from bitwright.stream import units, worker_pool

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_experts_per_tok": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "olmo2": {"tie_word_embeddings": True},
    "gpt_neox": {},
    "falcon": {"new_decoder_architecture": False},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16, "layer_types": ["full_attention", "sliding_attention"]},
}
"""Architectures that nobody has described to Bitwright: linears, linears of a class of their own, experts in many
tensors and in one."""


@pytest.fixture(scope="session")
def folder_of(tiny: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``folder_of(model_type)``: a small random model as transformers saves it, made once; nobody writes to it."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | MODELS[kind])))
            made[kind] = tmp_path_factory.mktemp(kind) / "model"
            model.to(torch.bfloat16).save_pretrained(made[kind])
            shutil.copy(tiny() / "tokenizer.json", made[kind])
        return made[kind]

    return of


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(3, 40)[None]).logits
    return found


@pytest.mark.parametrize(("scheme", "how", "format"), [
    ("W4A16", {"method": "easyquant"}, "bitwright"),
    ("W3A16g32", {"method": "easyquant", "outliers": "0", "quantize_lm_head": True}, None),
    ("W4A16g32sym", {"method": "rtn"}, None),
])  # fmt: skip
@pytest.mark.parametrize("kind", MODELS)
def test_an_architecture_that_nobody_described(
    kind: str, scheme: str, how: dict[str, Any], format: str | None, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """What transformers makes of the folder computes as the dense one does; the layer that is told to stays."""
    source = folder_of(kind)
    result = bitwright.quantize(Recipe(str(source), scheme, **how), tmp_path / "packed")
    dense = bitwright.quantize(Recipe(str(source), scheme, **how, format="dense"), tmp_path / "dense")
    expected, found = logits(Path(dense.output)), logits(Path(result.output))
    torch.testing.assert_close(found, expected, rtol=0, atol=0 if result.format == "bitwright" else 0.01)
    assert 1e-4 < float((expected - logits(source)).abs().max()) < 1
    if format is not None:
        assert result.format == format
    assert bitwright.verify(result.output, source, logits=False).passed
    assert bitwright.verify(result.output, logits=False).passed
    experts_apart, alike = kind == "mixtral" and not scheme.endswith("sym"), kind in ("falcon", "gpt_oss")
    if format is None:
        assert result.format == ("bitwright" if experts_apart or alike else "compressed-tensors")


def test_experts_are_turned_in_their_groups(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """GPT-OSS stores [in, out]: groups of 32 inputs are groups along what is stored first."""
    result = bitwright.quantize(Recipe(str(folder_of("gpt_oss")), "W4A16g32", "rtn"), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["model.layers.0.mlp.experts.gate_up_proj.weight_scale"].shape == (4, 2, 192)
    assert written["model.layers.0.self_attn.q_proj.weight_scale"].shape == (64, 2)
    assert result.per_ic == 0, "groups along the inputs, however they are stored"
    along = bitwright.quantize(Recipe(str(folder_of("gpt_oss")), "W4A16g32ic", "rtn"), tmp_path / "along")
    assert along.per_ic == along.linears == 12


@pytest.mark.parametrize("method", ["rtn", "easyquant"])
@pytest.mark.parametrize("scheme", ["W4A16", "W3A16g32", "W4A16g32ic", "W4A16sym"])
def test_as_block_by_block(method: str, scheme: str, tiny: Checkpoints, tmp_path: Path) -> None:
    """With text the same methods go through blocks, and decide the same."""
    free = bitwright.quantize(Recipe(str(tiny()), scheme, method, quantize_lm_head=True), tmp_path / "free")
    told = Recipe(str(tiny()), scheme, method, calibration="builtin", samples=2, seqlen=32, quantize_lm_head=True)
    bitwright.quantize(told, tmp_path / "told")
    weights = [load_file(tmp_path / out / "model.safetensors") for out in ("free", "told")]
    assert weights[0].keys() == weights[1].keys() and free.linears == 15
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    reports = [json.loads((tmp_path / out / "bitwright.json").read_text())["blocks"] for out in ("free", "told")]
    assert [block["name"] for block in reports[0]] == [block["name"] for block in reports[1]]
    for one, other in zip(*([row for block in r for row in block["linears"]] for r in reports), strict=True):
        assert one["name"] == other["name"] and one["storage_bits"] == other["storage_bits"]
        assert one["weight_error"] == pytest.approx(other["weight_error"], rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"outliers": "0.5%"}, {"axis": "auto"}, {"norm": 1.5}, {"axis": "ic"}])
def test_panels_and_units_change_nothing(
    settings: dict[str, Any], tiny: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(str(tiny()), "W3A16g32", "easyquant", **settings)
    bitwright.quantize(recipe, tmp_path / "whole")
    monkeypatch.setattr(panels, "PANEL", 7 * 64)
    monkeypatch.setattr(units, "UNIT_BYTES", 20_000)
    result = bitwright.quantize(recipe, tmp_path / "parts")
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    assert whole["model.safetensors"] == parts["model.safetensors"] and whole["config.json"] == parts["config.json"]
    accounts = [json.loads(found["bitwright.json"]) for found in (whole, parts)]
    assert [b["name"] for b in accounts[0]["blocks"]] == [b["name"] for b in accounts[1]["blocks"]]
    assert accounts[0]["totals"] == accounts[1]["totals"] and result.linears == 14


class TestPatterns:
    def test_excluded_and_included(self, tiny: Checkpoints, tmp_path: Path) -> None:
        recipe = Recipe(str(tiny()), "W4A16", "rtn", exclude="*.down_proj,model.layers.0.*.weight")
        result = bitwright.quantize(recipe, tmp_path / "out")
        written = Checkpoint.open(tmp_path / "out")
        packed = {name.removesuffix(".weight_packed") for name in written.names if name.endswith("_packed")}
        kept = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up")
        assert packed == {f"model.layers.1.{name}_proj" for name in kept}
        ignored = written.config["quantization_config"]["ignore"]
        assert "model.layers.0.mlp.up_proj" in ignored and "model.layers.1.mlp.down_proj" in ignored
        assert result.linears == 6
        assert logits(tmp_path / "out").isfinite().all()

    def test_included_head(self, tiny: Checkpoints, tmp_path: Path) -> None:
        result = bitwright.quantize(Recipe(str(tiny()), "W4A16", "rtn", include="lm_head"), tmp_path / "out")
        assert result.linears == 15 and "lm_head.weight_packed" in Checkpoint.open(tmp_path / "out")
        assert logits(tmp_path / "out").isfinite().all()

    @pytest.mark.parametrize("pattern", ["lm_head.weight", "lm_head", "*head*"])
    def test_a_tied_head_has_no_tensor_to_include(self, pattern: str, tiny: Checkpoints, tmp_path: Path) -> None:
        asked = Recipe(str(tiny(tied=True)), "W4A16", "rtn", include=pattern)
        with pytest.raises(RecipeError, match=r"no tensor for its output layer.*--quantize-lm-head quantizes a copy"):
            bitwright.quantize(asked, tmp_path / "out")
        assert bitwright.plan(replace(asked, include=None, quantize_lm_head=True)).linears == 15

    @pytest.mark.parametrize("kind", [list, tuple])
    def test_patterns_in_a_list_are_those_with_commas(self, kind: Any, tiny: Checkpoints) -> None:
        listed = Recipe(str(tiny()), "W4A16", exclude=kind(["*.up_proj", "*.down_proj"]), include=kind([]))
        assert listed == Recipe(str(tiny()), "W4A16", exclude="*.up_proj,*.down_proj")
        assert bitwright.plan(listed).linears == 10
        with pytest.raises(RecipeError, match=r"'exclude' is \{.*it takes str or list or tuple or nothing"):
            Recipe(str(tiny()), "W4A16", exclude={"*.up_proj": 1})  # type: ignore[arg-type] # what is refused

    @pytest.mark.parametrize(("how", "says"), [
        ({"exclude": "*.dwn_proj"}, r"--exclude \*\.dwn_proj fits no tensor.*near it: .*down_proj"),
        ({"include": "*norm*"}, r"which has shape \[64\]: a linear has two dimensions"),
        ({"include": "model.embed_tokens"}, "is no linear in the model that transformers makes"),
        ({"exclude": "*"}, r"(?s)nothing to quantize.*14 such as .*: excluded by \*.*--exclude leaves nothing"),
        ({"include": "*q_proj", "calibration": "builtin"}, "--include goes with methods"),
    ])  # fmt: skip
    def test_refused(self, how: dict[str, Any], says: str, tiny: Checkpoints, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match=says):
            bitwright.quantize(Recipe(str(tiny()), "W4A16", "rtn", **how), tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_groups_that_do_not_divide_name_the_way_out(self, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
        with pytest.raises(SchemeError, match=r"--exclude 'gpt_neox.layers.\*.mlp.dense_4h_to_h'"):
            bitwright.quantize(Recipe(str(folder_of("gpt_neox")), "W4A16g64", "rtn"), tmp_path / "out")

    def test_the_way_out_is_one_for_all_that_do_not_divide(self, tiny: Checkpoints) -> None:
        asked = Recipe(str(tiny(intermediate_size=96, head_dim=12)), "W4A16g64", "rtn", quantize_lm_head=True)
        with pytest.raises(SchemeError, match=r"o_proj \[64, 48\]") as error:
            bitwright.plan(asked)
        advised = str(error.value).split("'")[1]
        assert advised == "model.layers.*.self_attn.o_proj,model.layers.*.mlp.down_proj"
        assert bitwright.plan(replace(asked, exclude=advised)).linears == 11

    def test_a_copied_head_that_does_not_divide_has_its_own_way_out(self, tiny: Checkpoints) -> None:
        source = str(tiny(tied=True, hidden_size=48, intermediate_size=64, head_dim=16))
        asked = Recipe(source, "W4A16g64", "rtn", quantize_lm_head=True)
        says = r"Or leave --quantize-lm-head out and leave what does not fit as it is: --exclude '.*q_proj,"
        with pytest.raises(SchemeError, match=says) as error:
            bitwright.plan(asked)
        advised = str(error.value).split("'")[1]
        assert "lm_head" not in advised and "embed" not in advised
        assert bitwright.plan(replace(asked, quantize_lm_head=False, exclude=advised)).linears == 4

    def test_the_plan_lists_what_happens_to_every_tensor(self, folder_of: Callable[[str], Path]) -> None:
        source = folder_of("gpt_oss")
        found = bitwright.plan(Recipe(str(source), "W4A16", "rtn", exclude="*.q_proj"))
        assert sum(kind.count for kind in found.tensors) == len(Checkpoint.open(source).names)
        kinds = {kind.name: kind for kind in found.tensors}
        assert kinds["model.layers.*.mlp.experts.down_proj"].why == "4 experts, stored [in, out]"
        assert kinds["model.layers.*.self_attn.q_proj.weight"].why == "excluded by *.q_proj"
        assert not kinds["model.layers.*.self_attn.q_proj.weight"].quantized


@pytest.fixture(scope="module")
def recipe(tiny: Checkpoints) -> Recipe:
    return Recipe(str(tiny()), "W3A16g32", "easyquant", shard_size="60KB")


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    bitwright.quantize(recipe, out, workers=1)
    return contents(out)


def started(recipe: Recipe, out: Path, *flags: str, program: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    """The command line in a process of its own."""
    what = ["--scheme", str(recipe.scheme), "--method", "easyquant", "--shard-size", recipe.shard_size, "-o", str(out)]
    command = [sys.executable, *(program or ("-m", "bitwright")), "quantize", recipe.model, *what, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


CHANGING = """
import os, time
from pathlib import Path
from bitwright.checkpoint import merge
from bitwright.checkpoint.reader import Checkpoint
from bitwright.cli import main

read = Checkpoint.read_slice
journals = [Path({work!r}) / name for name in ("journal.jsonl", "journal-1.jsonl")]

def late(self, name, *rows):
    if name.endswith("down_proj.weight"):
        while not all(path.exists() and len(path.read_text().splitlines()) > 1 for path in journals):
            time.sleep(0.01)
        os.utime(Path({model!r}) / "model.safetensors", (1, 1))
    return read(self, name, *rows)

Checkpoint.read_slice = late
main()
"""
"""The command line, whose checkpoint is written to once both ranks have noted a part that they copied."""


class TestProcesses:
    def test_two_workers_give_the_same_bytes(self, recipe: Recipe, whole: dict[str, bytes], tmp_path: Path) -> None:
        result = bitwright.quantize(recipe, tmp_path / "out", workers=2)
        assert contents(tmp_path / "out") == whole
        assert result.peak_bytes > 0

    def test_a_script_without_a_guard(self, recipe: Recipe, whole: dict[str, bytes], tmp_path: Path) -> None:
        script, wanted = tmp_path / "script.py", (recipe.model, recipe.scheme, "easyquant")
        asked = f"bitwright.Recipe(*{wanted!r}, shard_size={recipe.shard_size!r})"
        script.write_text(f"import bitwright\nbitwright.quantize({asked}, {str(tmp_path / 'out')!r}, workers=2)\n")
        subprocess.run([sys.executable, str(script)], check=True, timeout=120)
        assert contents(tmp_path / "out") == whole

    def test_torchrun(self, recipe: Recipe, whole: dict[str, bytes], tmp_path: Path) -> None:
        program = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bitwright")
        run = started(recipe, tmp_path / "out", "--json", program=program)
        out, err = run.communicate(timeout=240)
        assert run.returncode == 0, err
        assert contents(tmp_path / "out") == whole
        assert json.loads(out)["linears"] == 14, "said once"

    def test_torchrun_and_a_checkpoint_that_changes(self, tiny: Checkpoints, tmp_path: Path) -> None:
        """Both ranks have noted something when it happens, and neither journal is left."""
        model = Path(shutil.copytree(tiny(), tmp_path / "model"))
        script, recipe = tmp_path / "script.py", Recipe(str(model), "W3A16g32", "easyquant")
        script.write_text(CHANGING.format(work=str(tmp_path / "out.partial"), model=str(model)))
        program = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script))
        run = started(recipe, tmp_path / "out", program=program)
        _, err = run.communicate(timeout=240)
        assert run.returncode != 0 and "changed under the run: it was written to since it was opened" in err
        assert list((tmp_path / "out.partial").glob("part-*")) and not (tmp_path / "out.partial" / "result").exists()
        assert bitwright.quantize(recipe, tmp_path / "out").resumed == 0

    def test_torchrun_says_the_plan_once(self, recipe: Recipe, tmp_path: Path) -> None:
        program = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bitwright")
        run = started(recipe, tmp_path / "out", "--dry-run", "--json", program=program)
        out, err = run.communicate(timeout=240)
        assert run.returncode == 0, err
        assert json.loads(out)["linears"] == 14

    def test_torchrun_is_refused_for_blocks(self, recipe: Recipe, tmp_path: Path) -> None:
        program = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bitwright")
        run = started(recipe, tmp_path / "out", "--calibration", "builtin", program=program)
        _, err = run.communicate(timeout=240)
        assert run.returncode != 0 and err.count("torchrun shares tensors out between processes") == 1
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("moment", [0, 2, 5])
    @pytest.mark.parametrize("workers", [1, 2])
    def test_killed_and_again(
        self, moment: int, workers: int, recipe: Recipe, whole: dict[str, bytes], tmp_path: Path
    ) -> None:
        """kill -9 once so many parts are noted; the same command, with other workers, gives the same bytes."""
        out = tmp_path / "out"
        run = started(recipe, out, "--workers", str(workers), program=("-c", SLOW))
        journal = tmp_path / "out.partial" / "journal.jsonl"
        while run.poll() is None and len(journal.read_text().splitlines() if journal.exists() else ()) < 1 + moment:
            time.sleep(0.01)
        assert run.poll() is None, run.communicate()
        run.send_signal(signal.SIGKILL)
        run.communicate()
        assert not out.exists()
        result = bitwright.quantize(recipe, out, workers=3 - workers)
        assert result.resumed >= moment
        assert contents(out) == whole

    def test_no_worker_outlives_the_one_who_started_it(self, recipe: Recipe, tmp_path: Path) -> None:
        run = started(recipe, tmp_path / "out", "--workers", "2", program=("-c", SLOW))
        children: list[int] = []
        while run.poll() is None and len(children) < 2:
            children = list(_children(run.pid))
            time.sleep(0.01)
        assert len(children) == 2
        run.send_signal(signal.SIGKILL)
        run.communicate()
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in children):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def test_a_worker_that_is_killed_is_told_of(
        self, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(units, "UNIT_BYTES", 20_000)
        bitwright.quantize(recipe, tmp_path / "whole")
        killed: list[int] = []

        def kill_a_worker(progress: Progress) -> None:
            if progress.done and not killed:  # a part is finished
                killed.append(next(_children(os.getpid())))
                os.kill(killed[0], signal.SIGKILL)

        with pytest.raises(UserError, match=r"a worker process was killed \(SIGKILL\).*What is finished is kept"):
            bitwright.quantize(recipe, tmp_path / "out", workers=2, listener=kill_a_worker)
        assert bitwright.quantize(recipe, tmp_path / "out", workers=1).resumed > 0
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")

    def test_what_a_worker_meets_is_told_as_it_is(self, tiny: Checkpoints, tmp_path: Path) -> None:
        model = Path(shutil.copytree(tiny(), tmp_path / "model"))
        damaged = load_file(model / "model.safetensors")
        damaged["model.layers.1.mlp.up_proj.weight"][5, 7] = torch.nan
        save_file(damaged, model / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*has 1 NaN"):
            bitwright.quantize(Recipe(str(model), "W4A16", "easyquant"), tmp_path / "out", workers=2)

    @pytest.mark.parametrize("workers", [1, 2])
    def test_a_checkpoint_that_changes_under_the_run(self, workers: int, tiny: Checkpoints, tmp_path: Path) -> None:
        model = Path(shutil.copytree(tiny(), tmp_path / "model"))

        def touch(progress: Progress) -> None:
            os.utime(model / "model.safetensors", (1, 1))

        recipe = Recipe(str(model), "W4A16", "rtn")
        with pytest.raises(UserError, match="changed under the run: it was written to since it was opened"):
            bitwright.quantize(recipe, tmp_path / "out", workers=workers, listener=touch)
        assert bitwright.quantize(recipe, tmp_path / "out").resumed == 0, "what was made of two models is not used"

    @pytest.mark.parametrize("calibration", [None, "builtin"])
    @pytest.mark.parametrize("shard", [1, 2])
    def test_a_checkpoint_that_changes_while_parts_are_joined(
        self, shard: int, calibration: str | None, tiny: Checkpoints, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """What is left holds a plan, and finished shards of the model as it was."""
        model = Path(shutil.copytree(tiny(), tmp_path / "model"))
        recipe = Recipe(str(model), "W4A16", "rtn", shard_size="30KB", calibration=calibration)
        recipe = recipe if calibration is None else replace(recipe, samples=2, seqlen=32)
        before = merge.PLAN if shard == 1 else f"model-{shard - 1:05d}-of-"
        put, changes = os.replace, list[str]()

        def changed_after(source: Path, target: Path) -> None:
            put(source, target)
            if not changes and target.name.startswith(before):
                changes.append(target.name)
                tensors = {name: -tensor for name, tensor in load_file(model / "model.safetensors").items()}
                save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", changed_after)
            with pytest.raises(UserError, match="changed under the run"):
                bitwright.quantize(recipe, tmp_path / "out")
        assert bitwright.quantize(recipe, tmp_path / "out").resumed == 0
        bitwright.quantize(recipe, tmp_path / "fresh")
        assert contents(tmp_path / "out") == contents(tmp_path / "fresh")

    @pytest.mark.parametrize(("how", "says"), [
        ({"workers": 0}, "at least one is needed"),
        ({"workers": "2"}, "a whole number or None was expected"),
        ({"max_memory": 10**9}, "a text or None was expected"),
        ({"max_memory": "5"}, "'5' is no size"),
        ({"max_memory": "10MB"}, r"one process alone needs about \d\.\d GB, .* allow \d"),
        ({"max_memory": "much"}, "'much' is no size"),
    ])  # fmt: skip
    def test_refused(self, how: dict[str, Any], says: str, recipe: Recipe, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=says):
            bitwright.quantize(recipe, tmp_path / "out", **how)
        assert not list(tmp_path.iterdir())

    def test_refused_where_blocks_depend_on_one_another(self, tiny: Checkpoints, tmp_path: Path) -> None:
        told = Recipe(str(tiny()), "W4A16", "gptq", calibration="builtin", samples=2, seqlen=32)
        with pytest.raises(RecipeError, match="--workers shares tensors out"):
            bitwright.quantize(told, tmp_path / "out", workers=2)

    def test_the_plan_of_a_training_counts_it(self, tiny: Checkpoints) -> None:
        told = Recipe(str(tiny()), "W4A16", "lwc", calibration="builtin", samples=4, seqlen=64)
        found = bitwright.plan(told)
        assert found.memory_bytes == found.memory.total > bitwright.plan(replace(told, method="rtn")).memory_bytes

    def test_memory_bounds_the_workers(self, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
        monkeypatch.setattr(machine, "CGROUPS", Path("/nowhere"))
        monkeypatch.setattr(worker_pool, "free_memory", lambda: 10**11)
        many = bitwright.plan(recipe, workers=8)
        fewer = bitwright.plan(recipe, workers=8, max_memory="2GB")
        assert many.workers == 8 > fewer.workers >= 1
        assert fewer.memory_bytes <= 2e9 < many.memory_bytes


SLOW = """
import sys, time
from bitwright.written.sink import Sink
from bitwright.cli import main

note = Sink.note

def slowly(self, made):
    note(self, made)
    time.sleep(0.2)

Sink.note = slowly
main()
"""


def _children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        yield from map(int, task.read_text().split())


def test_more_outliers_than_usual_are_said(tiny: Checkpoints, tmp_path: Path) -> None:
    recipe = Recipe(str(tiny()), "W4A16", "easyquant", outliers="2.2")
    result = bitwright.quantize(recipe, tmp_path / "out")
    assert any("more outliers than the 1% that are usual" in note for note in result.notes)
    rows = [row for b in json.loads((tmp_path / "out/bitwright.json").read_text())["blocks"] for row in b["linears"]]
    assert len(rows) == 14
    assert all(row["outlier_share"] == row["outliers"] / (row["shape"][0] * row["shape"][1]) for row in rows)


def test_weights_that_are_all_alike_are_exact(tiny: Checkpoints, tmp_path: Path) -> None:
    """A single value, all zeros, one row of zeros: no division by zero, nothing lost."""
    model = Path(shutil.copytree(tiny(), tmp_path / "model"))
    found = load_file(model / "model.safetensors")
    found["model.layers.0.mlp.up_proj.weight"].fill_(0)
    found["model.layers.0.mlp.down_proj.weight"].fill_(0.1)
    found["model.layers.1.mlp.down_proj.weight"][3].fill_(0)
    save_file(found, model / "model.safetensors", metadata={"format": "pt"})
    for scheme in ("W2A16", "W4A16g32sym"):
        bitwright.quantize(Recipe(str(model), scheme, "easyquant", format="dense"), tmp_path / scheme)
        written = load_file(tmp_path / scheme / "model.safetensors")
        for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"):
            assert torch.equal(written[name], found[name]), name
        assert not written["model.layers.1.mlp.down_proj.weight"][3].any()


def test_memory_does_not_grow_with_a_weight(tiny: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight is widened to float32, and shown to a method, a panel at a time."""
    sizes: list[int] = []

    def watching(weight: torch.Tensor, context: WeightContext[Settings], decided: LinearDecision) -> LinearDecision:
        assert weight.dtype == torch.float32
        sizes.append(weight.numel())
        return decided

    monkeypatch.setattr(panels, "PANEL", 1000)
    monkeypatch.setattr(rtn, "METHOD", replace(rtn.METHOD, decide=watching))
    bitwright.quantize(Recipe(str(tiny()), "W4A16", "rtn"), tmp_path / "out", workers=1)
    every = load_file(tiny() / "model.safetensors")
    linears = [tensor.numel() for name, tensor in every.items() if name.endswith("_proj.weight")]
    assert max(sizes) <= 1000 < min(linears) and sum(sizes) == sum(linears)
