"""Bad input ends in one line that names the thing, exit code 2, and nothing half-written."""

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tyro
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny import config_file

from chroma_jax import config as configs
from chroma_jax.cli.main import COMMANDS, main


@pytest.fixture
def run(tiny_run) -> Path:
    return tiny_run


@pytest.fixture
def files(tmp_path, tiny_prepared, run):
    """Things to name on a command line; ``out`` is where nothing may appear."""
    config, prepared = tiny_prepared
    config_file(tmp_path, config.data.corpus)
    (tmp_path / "broken.py").write_text("def config(:\n")
    (tmp_path / "other.py").write_text("def config():\n    return {'model': 1}\n")
    (tmp_path / "raises.py").write_text("def config():\n    return undefined_name\n")
    (tmp_path / "exits.py").write_text("import sys\n\ndef config():\n    sys.exit(3)\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "zero.py").write_text("import chroma_jax\n\ndef config():\n    return chroma_jax.MeshConfig(data=0)\n")
    (tmp_path / "text.txt").write_text("this is not audio")
    shutil.copytree(prepared, tmp_path / "others")
    (tmp_path / "others" / "tokenizer.json").write_text((prepared / "tokenizer.json").read_text() + "\n")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 16_000)
    soundfile.write(tmp_path / "speech.wav", 0.1 * np.ones(16_000, np.float32), 16_000)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("keep me")
    tensors = load_file(run / "codec.safetensors")
    first, second, *_ = tensors
    save_file({k: v for k, v in tensors.items() if k != first} | {second: np.zeros(3, np.float32)}, tmp_path / "bad.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((run / "codec.safetensors").read_bytes()[:1000])
    return {"tmp": tmp_path, "prepared": prepared, "run": run, "out": tmp_path / "out"}


REPLY = "reply {run} --question {tmp}/speech.wav --reference {tmp}/speech.wav --transcript hello --out {out}"
TRAIN = "train {tmp}/tiny.py {out} --dataset_dir {prepared}"

# name → (command line, what the message must contain)
BAD = {
    "unknown command": ("trian nano x", ["unknown command 'trian'", "train"]),
    "unknown configuration": ("info nanno", ["'nanno'", "near: nano"]),
    "configuration missing": ("prepare", ["Missing from chroma-jax prepare: CONFIG", "Dataset folder to write"]),
    "configuration after its flags": ("chat --voice {tmp}/speech.wav {tmp}/full", ["full", "not a run folder"]),
    "unknown command of a group": ("bench smal", ["unknown command 'smal'", "near: bench small"]),
    "configuration file absent": ("info {tmp}/none.py", ["none.py", "no such configuration file"]),
    "configuration with a syntax error": ("info {tmp}/broken.py", ["broken.py", "SyntaxError"]),
    "configuration that raises": ("info {tmp}/raises.py", ["raises.py", "undefined_name"]),
    "configuration of another type": ("info {tmp}/other.py", ["other.py", "returned dict", "Config"]),
    "configuration that exits": ("info {tmp}/exits.py", ["exits.py", "SystemExit: 3"]),
    "configuration without its function": ("info {tmp}/empty.py", ["empty.py", "has no function config()"]),
    "configuration with a field out of bounds": ("info {tmp}/zero.py", ["zero.py: data is 0, expected"]),
    "unknown field": (
        "info nano --model.backbone.num_layer 3",
        ["--model.backbone.num_layer", "--model.backbone.num_hidden_layers"],
    ),
    "ill-typed field": ("info nano --model.backbone.num_hidden_layers many", ["--model.backbone.num_hidden_layers", "many"]),
    "unknown choice": ("info nano --optimizer.schedule stepwise", ["stepwise", "cosine"]),
    "fields that contradict each other": (
        "info nano --model.backbone.num_key_value_heads 3",
        ["num_attention_heads is 4", "num_key_value_heads 3"],
    ),
    "value out of range": ("info nano --loss.decoder_frame_fraction 1.5", ["decoder_frame_fraction", "1.5"]),
    **{
        f"{name} {value}": (f"{REPLY} --generation.{name} {value}", [f"--generation.{name} is ", "expected"])
        for name, values in {
            "temperature": ("-1", "nan", "inf", "1e-9", "1e9"),
            "top_p": ("0", "-0.5", "1.5", "nan"),
            "top_k": ("-5", "1099511627776"),
            "seed": ("-1", "4294967296", "18446744073709551616"),
            "max_seconds": ("0", "-1", "nan", "inf", "1e12"),
            "tensor": ("0", "-1"),
        }.items()
        for value in values
    },
    "missing argument": ("train nano", ["Run folder", "--dataset_dir"]),
    "corpus absent": ("prepare {tmp}/tiny.py {out} --data.corpus {tmp}/nowhere", ["nowhere"]),
    "data folder is something else": ("prepare {tmp}/tiny.py {tmp}/full --codec {run}/codec.safetensors", ["full"]),
    "codec absent": ("prepare {tmp}/tiny.py {out} --codec {tmp}/no.safetensors", ["no.safetensors"]),
    "codec cut short": ("prepare {tmp}/tiny.py {out} --codec {tmp}/cut.safetensors", ["cut.safetensors"]),
    "codec with wrong tensors": (
        "prepare {tmp}/tiny.py {out} --codec {tmp}/bad.safetensors",
        ["2 tensors do not fit", "missing: codec_model.", "misshapen: codec_model."],
    ),
    "not prepared data": ("train {tmp}/tiny.py {out} --dataset_dir {tmp}/full", ["full", "dataset.json"]),
    "data of another model": (TRAIN + " --model.num_codebooks 3", ["codebooks"]),
    "rows of another shape": (TRAIN + " --data.row.text 300", ["text=300"]),
    "batch that the mesh does not divide": (TRAIN + " --mesh.data 3", ["training.global_batch_size 8", "= 3"]),
    "more devices than there are": (TRAIN + " --mesh.context 16 --training.global_batch_size 16", ["16 devices", "8 present"]),
    "mesh that does not divide a weight": (TRAIN + " --mesh.tensor 8", ["kernel", "heads", "not divisible"]),
    "freeze pattern that fits nothing": (TRAIN + " --optimizer.freeze bakbone", ["bakbone", "matches no weight"]),
    "data with another tokenizer than the run's": (
        "train {tmp}/tiny.py {run} --dataset_dir {tmp}/others",
        ["its tokenizer.json differs", "--init-from"],
    ),
    **{
        f"{url} as {what}": (command.replace("URL", url), [url, "object storage is not supported"])
        for url, what, command in [
            ("s3://bucket/x", "a dataset", TRAIN.replace("{prepared}", "URL")),
            ("hf://a/b", "a corpus", "prepare {tmp}/tiny.py {out} --data.corpus URL"),
        ]
    },
    **{
        f"gs://bucket/x as {what}": (
            command.replace("URL", "gs://bucket/x"),
            ["gs://bucket/x", "object storage is not supported"],
        )
        for what, command in {
            "a dataset": TRAIN.replace("{prepared}", "URL"),
            "a run folder": TRAIN.replace("{out}", "URL"),
            "a corpus": "prepare {tmp}/tiny.py {out} --data.corpus URL",
            "a run to reply from": REPLY.replace("{run}", "URL"),
            "a recording": REPLY.replace("{tmp}/speech.wav --reference", "URL --reference"),
            "a folder to write": REPLY.replace("{out}", "URL"),
            "a source": "convert import URL {out}",
        }.items()
    },
    "a file URL": (TRAIN.replace("{prepared}", "file:///data"), ["--dataset_dir is 'file://data'", "name the path alone"]),
    "results below a file": (REPLY.replace("{out}", "{tmp}/text.txt/out"), ["text.txt is not a folder"]),
    "run folder is something else": ("train {tmp}/tiny.py {tmp}/full --dataset_dir {prepared}", ["full", "not a run folder"]),
    "run of another model": (
        "train {tmp}/tiny.py {run} --dataset_dir {prepared} --model.decoder.rms_norm_eps 1e-4",
        ["rms_norm_eps", "another run"],
    ),
    "reply from no run": (REPLY.replace("{run}", "{tmp}/full"), ["full", "not a run folder"]),
    "question absent": (REPLY.replace("{tmp}/speech.wav --reference", "{tmp}/no.wav --reference"), ["no.wav"]),
    "question not readable": (REPLY.replace("{tmp}/speech.wav --reference", "{tmp}/text.txt --reference"), ["text.txt"]),
    "reference empty": (
        REPLY.replace("--reference {tmp}/speech.wav", "--reference {tmp}/empty.wav"),
        ["empty.wav", "no samples"],
    ),
    "export onto something": ("export {run} {tmp}/full", ["full", "exists"]),
    "export with nothing in a file": ("export {run} {out} --shard_gb 0", ["--shard_gb is 0"]),
    "export of another format": ("export {run} {out} --format onnx", ["onnx", "stablehlo"]),
    "artifact for less than a question": ("export {run} {out} --format stablehlo --text 9", ["text is 9", "10 seconds"]),
    "import without a source": ("convert import {out}", ["SOURCE", "DEST"]),
    "import of nothing": ("convert import {tmp}/nowhere {out}", ["nowhere", "no safetensors file"]),
    "import of what is no checkpoint": ("convert import {tmp}/text.txt {out}", ["text.txt", "no safetensors file"]),
    "import onto no configuration": ("convert import {run}/codec.safetensors {out} --onto nanno", ["nanno", "near: nano"]),
    "import onto other sizes": ("convert import {run}/codec.safetensors {out} --onto nano", ["misshapen: codec_model."]),
    "convert what": ("convert", ["unknown command 'convert'", "convert import"]),
    "start from nothing": (TRAIN + " --init-from {tmp}/nowhere", ["nowhere", "not a run folder"]),
    "start from another model": (
        TRAIN + " --init-from {run} --model.backbone.rms_norm_eps 1e-4",
        ["--model.backbone.rms_norm_eps 1e-05"],
    ),
    "export of no run": ("export {tmp}/full {out}", ["full", "not a run folder"]),
    "suite absent": ("verify {tmp}/nowhere", ["nowhere", "no such folder"]),
    "suite without cases": ("verify {tmp}/full", ["full", "no golden case"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, files, capsys):
    command, expected = BAD[name]
    before = sorted(p for p in files["tmp"].rglob("*"))
    run_before = sorted(files["run"].rglob("*"))
    assert main([word.format(**files) for word in command.split()]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]  # progress bars may stand before it
    assert message.startswith("chroma-jax: error: ")
    for part in expected:
        assert part in message, message
    after = [p for p in files["tmp"].rglob("*") if "__pycache__" not in p.parts]
    assert sorted(after) == before, "something was left behind"
    assert sorted(files["run"].rglob("*")) == run_before


def test_a_fault_of_the_program_is_one_line_and_debug_shows_its_traceback(monkeypatch, capsys):
    def broken(args, config):
        raise KeyError("no such\nkey")

    monkeypatch.setitem(COMMANDS, "info", (COMMANDS["info"][0], broken, "file"))
    assert main(["info", "nano"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "chroma-jax: fault: KeyError: 'no such\\nkey'; please report it with the output of the same command and --debug"
    ]
    assert main(["info", "nano", "--debug"]) == 1
    assert "in broken" in capsys.readouterr().err


def test_debug_shows_where_bad_input_was_refused(capsys):
    assert main(["--debug", "info", "nanno"]) == 2
    assert "Traceback" in (err := capsys.readouterr().err) and err.splitlines()[-1].startswith("chroma-jax: error: ")


def test_a_damaged_checkpoint_is_named(files, capsys):
    copy = files["tmp"] / "damaged"
    shutil.copytree(files["run"], copy)
    for file in (copy / "checkpoints" / "0").rglob("*"):
        if file.is_file() and file.stat().st_size > 20:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    command = REPLY.replace("{run}", str(copy)).split()
    assert main([word.format(**files) for word in command]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "checkpoints" in message and "chroma-jax: error: " in message
    assert not files["out"].exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    assert COMMANDS[command][0].__doc__.split()[0] in capsys.readouterr().out


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == main([]) == 0
    out = capsys.readouterr().out
    assert all(word in out for name in COMMANDS for word in name.split())
    assert "75: training stopped on request" in out and "chroma_4b_stage1" in out


def test_the_help_of_one_command_builds_only_its_parser(capsys, monkeypatch):
    built = []
    made = tyro._parsers.ParserSpecification.from_callable_or_type

    def from_callable_or_type(f, *args, **kwargs):
        built.append(getattr(f, "__name__", ""))
        return made(f, *args, **kwargs)

    monkeypatch.setattr(tyro._parsers.ParserSpecification, "from_callable_or_type", staticmethod(from_callable_or_type))
    assert main(["bench", "small", "--help"]) == 0
    assert "BenchSmall" in built and not {accepted.__name__ for accepted, *_ in COMMANDS.values()} & set(built) - {"BenchSmall"}


def test_a_command_has_an_alias(capsys):
    assert main(["reply", "--help"]) == 0
    assert "chroma-jax generate" in capsys.readouterr().out


def test_info_prints_the_parts(capsys):
    assert main(["info", "chroma_4b"]) == 0
    out = capsys.readouterr().out
    for figure in ("637,676,544", "3,397,103,616", "977,346,560", "161,560,576", "79,308,609"):
        assert figure in out


def test_a_field_is_overridden(capsys):
    assert main(["info", "nano", "--model.backbone.num_hidden_layers", "1"]) == 0
    one = capsys.readouterr().out
    main(["info", "nano"])
    assert one != capsys.readouterr().out


@pytest.mark.compilations(300)
def test_export_reads_back_bit_for_bit(files):
    import jax

    from chroma_jax.config import load
    from chroma_jax.models.io.hf_config import from_hf, to_hf
    from chroma_jax.runs.load import load_run

    dest = files["tmp"] / "export"
    assert main(["export", str(files["run"]), str(dest), "--shard_gb", "0.0001"]) == 0
    assert len(list(dest.glob("*.safetensors"))) > 1
    config = load(files["run"])
    trained, exported = load_run(files["run"], config), load_run(dest, config)
    for ours, theirs in zip(trained[:2], exported[:2], strict=True):
        jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(ours)), nnx.to_pure_dict(nnx.state(theirs)))
    assert trained[2].to_str() == exported[2].to_str()
    assert exported[0].config == config.model
    assert from_hf(to_hf(config.model)) == config.model


def test_exported_names_are_the_released_ones(files):
    """Every tensor of the reference's own checkpoint of a full model, but vision, has a counterpart of the same name."""
    from safetensors import safe_open

    dest = files["tmp"] / "export"
    main(["export", str(files["run"]), str(dest)])
    ours = set()
    for shard in dest.glob("*.safetensors"):
        with safe_open(shard, "np") as file:
            ours |= set(file.keys())
    strip = lambda names: {".".join("0" if part.isdigit() else part for part in n.split(".")) for n in names}
    theirs = set()
    for case in ("thinker", "backbone", "decoder", "codec"):
        with safe_open(Path(__file__).parent / "golden" / case / "weights.safetensors", "np") as file:
            theirs |= {n for n in file.keys() if not n.startswith("thinker.visual.")}
    assert strip(ours) == strip(theirs)


def documented(cls: type) -> set[str]:
    """Fields that a docstring describes under Attributes."""
    _, _, attributes = (cls.__doc__ or "").partition("Attributes:\n")
    return set(re.findall(r"^ {8}(\w+): \S", attributes, re.MULTILINE))


def dataclasses_below(cls: type) -> set[type]:
    """A dataclass, and those of its fields' defaults."""
    found = {cls}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default):
            found |= dataclasses_below(type(field.default))
    return found


def test_every_flag_has_a_sentence_of_its_own():
    commands = {arguments for arguments, _, _ in COMMANDS.values()}
    classes = set().union(*map(dataclasses_below, commands | {configs.Config, configs.CodecRun}))
    missing = {cls.__name__: names for cls in classes if (names := {f.name for f in dataclasses.fields(cls)} - documented(cls))}
    assert not missing
