"""The reference implementation's outputs are reproduced, case by case, through the command that users have."""

from pathlib import Path

import pytest

from chroma_jax.cli.main import main
from chroma_jax.inference import step
from chroma_jax.verify import reference
from chroma_jax.verify.verify import table, verify

SUITE = Path(__file__).parent / "golden"


COMPONENTS = ["features", "audio_encoder", "thinker", "backbone", "decoder", "codec", "train_grad"]
GENERATIONS = ["gen_b2", "gen_b2_codec_eos"]  # rows of different lengths, together and apart, and their ends
MORE = ["gen_b1", "gen_b2_thinker_eos", "gen_codec_eos_all", "gen_codec_eos_first", "gen_thinker_eos"]
# Of other sizes throughout: fewer codebooks than the Codec has, other RoPE, heads, windows, mel bins; see their READMEs.
OTHERS = ["other_a/codec", "other_a/gen_b2", "other_b/gen_b2"]
CASES = COMPONENTS + GENERATIONS + [pytest.param(case, marks=pytest.mark.slow) for case in MORE + OTHERS]


@pytest.mark.compilations(300)
@pytest.mark.parametrize("case", CASES)
def test_case(case, record_property):
    (result,) = verify(SUITE / case)
    record_property("golden", table(result._replace(case=case), every=False).splitlines()[-1])
    assert result.error is None, result.error
    assert result.checks
    assert not [check for check in result.checks if not check.passed]


PROGRAMS = (reference.frame, reference.reference_frame)  # those that contain the step


def test_two_swapped_codes_in_the_decode_step_fail(monkeypatch):
    """verify runs the step that users run: a fault in it is found."""
    residual_codes = step.residual_codes

    def swapped(*given):
        codes, logits = residual_codes(*given)
        return codes.at[:, 1].set(codes[:, 2]).at[:, 2].set(codes[:, 1]), logits

    monkeypatch.setattr(step, "residual_codes", swapped)
    for program in PROGRAMS:
        program.clear_cache()
    (result,) = verify(SUITE / "gen_b2_codec_eos")
    for program in PROGRAMS:
        program.clear_cache()
    failed = {check.quantity for check in result.checks if not check.passed}
    assert "codes" in failed and any(quantity.startswith("audio_0") for quantity in failed)


def test_an_unknown_kind_of_case_is_listed_and_fails(tmp_path, capsys):
    (tmp_path / "telepathy").mkdir()
    (tmp_path / "telepathy" / "outputs.safetensors").write_bytes(b"")
    assert main(["verify", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "telepathy" in out and "unknown kind" in out and "0 cases passed, 1 failed" in out


def test_a_wrong_output_fails(tmp_path, capsys):
    import shutil

    from safetensors.numpy import load_file, save_file

    shutil.copytree(SUITE / "audio_encoder", tmp_path / "audio_encoder")
    outputs = load_file(tmp_path / "audio_encoder" / "outputs.safetensors")
    outputs["audio_features"] = outputs["audio_features"] + 1e-3
    save_file(outputs, tmp_path / "audio_encoder" / "outputs.safetensors")
    assert main(["verify", str(tmp_path), "--every", "quantity"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert len(lines) == 2 and "audio_features" in lines[1]


def test_an_output_that_nothing_compares_fails(tmp_path):
    import shutil

    from safetensors.numpy import load_file, save_file

    shutil.copytree(SUITE / "audio_encoder", tmp_path / "audio_encoder")
    outputs = load_file(tmp_path / "audio_encoder" / "outputs.safetensors")
    save_file(outputs | {"mystery": outputs["num_tokens"]}, tmp_path / "audio_encoder" / "outputs.safetensors")
    (result,) = verify(tmp_path)
    assert [c.quantity for c in result.checks if not c.passed] == ["mystery: not compared"]
