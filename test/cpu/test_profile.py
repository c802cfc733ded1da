from __future__ import annotations

import dataclasses
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drift_scheduler.partition import Partition
from drift_scheduler.profile import (
    GuardCell,
    Kind,
    Profile,
    ProfileError,
    ProfileKey,
    Sample,
    Split,
)
from drift_scheduler.shapes import DecodeShape, PrefillShape

KEY = ProfileKey(
    gpu="NVIDIA H100 80GB HBM3",
    sms=132,
    model="32 layers, 4096 hidden, 32/8 heads, 14336 intermediate, 128256 vocab",
    tp=1,
    dtype="bfloat16",
    versions={"torch": "2.11.0", "triton": "3.6.0"},
)
WHOLE = Split(132, 132, exclusive=True)
STEP = DecodeShape(requests=32, context=64_000)
BATCH = PrefillShape.of([(512, 4096), (100, 0)])
SAMPLES = (
    Sample(Kind.PREFILL, Split(100, 32), 0.03, prefill=BATCH, layers=4),
    Sample(Kind.DECODE, Split(100, 32), 0.02, decode=STEP, clock_mhz=1980.0),
    Sample(Kind.DECODE, Split(100, 32), 0.025, decode=STEP, prefill=BATCH, beside=True),
    Sample(Kind.FUSED, WHOLE, 0.031, decode=STEP, prefill=BATCH),
)
CELLS = (GuardCell(Kind.DECODE, Split(100, 32), 10, 12, 6, 16, worst=1.31, expected=1.22),)
PROFILE = Profile(KEY, SAMPLES, CELLS)

sizes = st.integers(1, 1 << 40)
seconds = st.floats(1e-9, 1e9)
clocks = st.none() | st.floats(1.0, 1e4)
splits = st.builds(Split, st.integers(1, 500), st.integers(1, 500), st.booleans())
steps = st.builds(DecodeShape, sizes, sizes)
batches = st.builds(PrefillShape, sizes, sizes, sizes, sizes)
layers = st.integers(1, 200)
samples = st.one_of(
    st.builds(Sample, st.just(Kind.DECODE), splits, seconds, decode=steps, clock_mhz=clocks),
    st.builds(Sample, st.just(Kind.PREFILL), splits, seconds, prefill=batches, layers=layers),
    st.builds(Sample, st.just(Kind.FUSED), splits, seconds, decode=steps, prefill=batches),
    st.builds(
        Sample,
        st.just(Kind.PREFILL),
        splits,
        seconds,
        decode=steps,
        prefill=batches,
        layers=layers,
        beside=st.just(True),
    ),
)


@given(st.lists(samples, max_size=6))
def test_whatever_was_measured_comes_back(measured):
    back = Profile.from_json(Profile(KEY, measured, CELLS).to_json())
    assert back.key == KEY
    assert set(back.samples) == set(measured)
    assert len(back.samples) == len(measured)
    assert tuple(back.cells) == CELLS


def test_the_order_of_measuring_does_not_show():
    turned = Profile(KEY, SAMPLES[::-1], CELLS)
    assert turned.to_json() == PROFILE.to_json()


def test_a_line_for_each_sample():
    assert sum('"seconds":' in line for line in PROFILE.to_json().splitlines()) == len(SAMPLES)


def test_a_partition_becomes_a_split():
    assert Split.of(Partition(3, 100, 32)) == Split(100, 32)
    assert str(Split.of(Partition(0, 132, 132, exclusive=True))) == "whole"
    assert str(Split(100, 32)) == "p100/d32"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seconds": 0.0}, "seconds=0.0"),
        ({"seconds": float("nan")}, "seconds=nan"),
        ({"clock_mhz": 0.0}, "clock_mhz=0.0"),
        ({"prefill": None}, "prefill=None"),
        ({"decode": STEP}, "decode="),
        ({"beside": True}, "decode=None"),
        ({"layers": 0}, "layers=0"),
        ({"kind": Kind.DECODE}, "decode=None"),
        ({"kind": Kind.FUSED, "beside": True}, "beside a fused step"),
    ],
)
def test_a_sample_that_makes_no_sense_is_refused(change, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(SAMPLES[0], **change)


def test_saved_and_loaded(tmp_path):
    path = tmp_path / "profiles" / "h100.json"
    PROFILE.save(path)
    loaded = Profile.load(path, KEY)
    assert set(loaded.samples) == set(SAMPLES)
    assert [file.name for file in path.parent.iterdir()] == ["h100.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "h100.json"
    PROFILE.save(path)
    before = path.read_bytes()

    def fail(*paths):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        Profile(KEY, SAMPLES[:1]).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["h100.json"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"gpu": "NVIDIA A100"}, "gpu: found 'NVIDIA H100 80GB HBM3', expected 'NVIDIA A100'"),
        ({"sms": 108}, "sms: found 132, expected 108"),
        ({"tp": 2}, "tp: found 1, expected 2"),
        ({"dtype": "float16"}, "dtype: found 'bfloat16', expected 'float16'"),
        ({"model": "80 layers"}, "model: found '32 layers"),
        (
            {"versions": {"torch": "2.12.0", "triton": "3.6.0"}},
            "versions.torch: found '2.11.0', expected '2.12.0'",
        ),
        ({"versions": {"torch": "2.11.0"}}, "versions.triton: found '3.6.0', expected nothing"),
        (
            {"versions": {**KEY.versions, "flashinfer": "0.6"}},
            "versions.flashinfer: found nothing, expected '0.6'",
        ),
    ],
)
def test_a_foreign_profile_is_refused_with_what_differs(tmp_path, change, named):
    path = tmp_path / "h100.json"
    PROFILE.save(path)
    with pytest.raises(ProfileError) as caught:
        Profile.load(path, dataclasses.replace(KEY, **change))
    message = str(caught.value)
    assert str(path) in message
    assert named in message
    assert message.count("found") == 1  # and nothing that does not differ
    assert "--drift-profile" in message
    assert "python -m sglang.profile_drift" in message


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[: len(text) // 2], "truncated"),
        (lambda text: text.replace('"layers":4', '"layers":"4"'), r"`\$.samples\[\d\].layers`"),
        (lambda text: text.replace('"seconds":0.03,', '"seconds":-0.03,'), "seconds=-0.03"),
        (lambda text: text.replace('"seconds":0.03,', ""), "seconds"),
        (lambda text: text.replace('"prefill",', '"prefil",'), "prefil"),
        (lambda text: text.replace('"worst":1.31', '"worst":-1.0'), "worst=-1.0"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "format: found 2, expected 1"),
        (lambda text: text.replace('"format": 1,', ""), "format"),
        (lambda text: "[]", "object"),
        (lambda text: "", "truncated"),
    ],
)
def test_a_damaged_file_is_refused_with_the_place(tmp_path, damage, reason):
    path = tmp_path / "h100.json"
    text = PROFILE.to_json()
    assert damage(text) != text
    path.write_text(damage(text))
    with pytest.raises(ProfileError, match=reason) as caught:
        Profile.load(path, KEY)
    assert str(path) in str(caught.value)


@given(st.binary(max_size=200))
def test_no_file_raises_anything_else(content):
    with pytest.raises(ProfileError):
        Profile.from_json(content)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ProfileError, match=r"none\.json cannot be read: No such file"):
        Profile.load(tmp_path / "none.json", KEY)
