"""Every message survives the wire, reaches only the sockets meant for it, and bad bytes raise."""

from __future__ import annotations

import typing
from array import array
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drift_scheduler.slo import Slo
from sglang.srt.messages import (
    ALL_MESSAGES,
    ControlReply,
    FinishReason,
    GenerateRequest,
    Handshake,
    Message,
    Shutdown,
    StreamOptions,
    TextBatch,
    ToDetokenizer,
    TokenBatch,
    ToScheduler,
    ToTokenizer,
    decoder_for,
    encode,
    token_ids,
)
from sglang.srt.sampling_params import SamplingParams

_REQUEST = GenerateRequest(
    rid="a", input_ids=token_ids([1, 2]), sampling=SamplingParams(), arrival_s=0.0
)
_DIRECTIONS: dict[str, Any] = {
    "scheduler": ToScheduler,
    "detokenizer": ToDetokenizer,
    "tokenizer": ToTokenizer,
    "start-up": Handshake,
}
_INT64 = st.integers(-(2**63), 2**63 - 1)
_FLOAT = st.floats(allow_nan=False)
_WIRE_DATA = st.recursive(
    st.none() | st.booleans() | _INT64 | _FLOAT | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


def _values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field's annotation. An annotation it does not know is an error, not a gap."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _WIRE_DATA
    if origin is list:
        return st.lists(_values(arguments[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(_values(arguments[0]), _values(arguments[1]), max_size=3)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if arguments:
        return st.one_of([_values(argument) for argument in arguments])
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        fields = typing.get_type_hints(kind)
        return st.builds(kind, **{name: _values(hint) for name, hint in fields.items()})
    if kind is array:
        return st.lists(st.integers(-(2**31), 2**31 - 1), max_size=3).map(token_ids)
    if kind is Slo:
        limits_s = st.floats(min_value=0, exclude_min=True, allow_nan=False)
        return st.builds(Slo, limits_s, limits_s, limits_s)
    plain: dict[Any, st.SearchStrategy[Any]] = {
        str: st.text(max_size=8),
        bytes: st.binary(max_size=8),
        int: _INT64,
        float: _FLOAT,
        bool: st.booleans(),
        type(None): st.none(),
    }
    return plain[kind]


def _accepts(direction: Any, kind: type[Message]) -> bool:
    return kind in (typing.get_args(direction) or (direction,))


def _minimal(kind: type[Message]) -> Message:
    """An instance with empty or zero values where the message has no default."""
    zeros: dict[str, Any] = {"str": "", "int": 0, "float": 0.0, "bool": False, "array": array("i")}
    values = {
        field.name: SamplingParams()
        if field.type is SamplingParams
        else zeros.get(getattr(field.type, "__name__", ""), [])
        for field in msgspec.structs.fields(kind)
        if field.required
    }
    return kind(**values)


@pytest.mark.parametrize("kind", ALL_MESSAGES, ids=lambda kind: kind.__name__)
def test_every_message_survives_every_socket_that_takes_it(kind: type[Message]) -> None:
    directions = [union for union in _DIRECTIONS.values() if _accepts(union, kind)]
    assert directions, f"{kind.__name__} is on no socket"
    decoders = [decoder_for(union) for union in directions]

    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    @given(message=_values(kind))
    def survives(message: Message) -> None:
        packed = encode(message)
        for decoder in decoders:
            unpacked = decoder.decode(packed)
            assert type(unpacked) is kind
            assert unpacked == message

    survives()


def test_all_messages_is_complete() -> None:
    assert set(ALL_MESSAGES) == set(Message.__subclasses__())
    assert len({kind.__struct_config__.tag for kind in ALL_MESSAGES}) == len(ALL_MESSAGES)


@pytest.mark.parametrize("name", _DIRECTIONS)
@pytest.mark.parametrize("kind", ALL_MESSAGES, ids=lambda kind: kind.__name__)
def test_a_message_on_the_wrong_socket_is_refused(kind: type[Message], name: str) -> None:
    decoder = decoder_for(_DIRECTIONS[name])
    packed = encode(_minimal(kind))
    if _accepts(_DIRECTIONS[name], kind):
        assert decoder.decode(packed) == _minimal(kind)
    else:
        with pytest.raises(msgspec.ValidationError):
            decoder.decode(packed)


def test_a_finish_reason_keeps_the_type_of_what_matched() -> None:
    batch = TokenBatch(
        opened=[
            StreamOptions(
                rid="a",
                prompt_tail=[1, 2],
                stop=["\n"],
                skip_special_tokens=True,
                spaces_between_special_tokens=True,
                no_stop_trim=False,
            )
        ],
        rids=["a", "b", "c"],
        new_ids=[[5], [], [6, 7]],
        finish=[
            FinishReason(type="stop", matched=7),
            FinishReason(type="stop", matched="7"),
            None,
        ],
        prompt_tokens=[3, 4, 5],
        cached_tokens=[0, 1, 2],
        completion_tokens=[1, 0, 2],
        retractions=[0, 0, 1],
    )
    unpacked = decoder_for(ToDetokenizer).decode(encode(batch))
    assert [reason and reason.matched for reason in unpacked.finish] == [7, "7", None]
    assert unpacked == batch


def test_default_containers_are_not_shared() -> None:
    one, other = ControlReply(call_id=1, ok=True), ControlReply(call_id=2, ok=True)
    one.data["free"] = 1
    assert other.data == {}


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\xc1",
        b"\xff\x00\x01",
        encode(Shutdown())[:-1],
        encode(Shutdown()) + b"\x00",
        msgspec.msgpack.encode([1, 2, 3]),
        msgspec.msgpack.encode({"type": "NoSuchMessage"}),
        msgspec.msgpack.encode({"rid": "no tag"}),
        msgspec.msgpack.encode({"type": "GenerateRequest", "rid": "fields are missing"}),
        msgspec.msgpack.encode({"type": "AbortRequest", "rid": 5}),
        encode(_REQUEST).replace(b"\xc4\x08", b"\xc4\x07"),  # ids of 7 bytes
        encode(_REQUEST).replace(b"\xc4\x08", b"\xa8"),  # a text in their place
        msgspec.msgpack.encode({"type": "FlushCache", "call_id": 2**70 // 2**7 * 1.5}),
    ],
    ids=repr,
)
def test_bad_bytes_raise_a_decode_error(packed: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decoder_for(ToScheduler).decode(packed)


@given(packed=st.binary(max_size=64))
def test_random_bytes_raise_nothing_else(packed: bytes) -> None:
    decoder = decoder_for(ToTokenizer)
    try:
        message = decoder.decode(packed)
    except msgspec.DecodeError:
        return
    assert isinstance(message, TextBatch | ControlReply)


def test_messages_are_frozen() -> None:
    request = GenerateRequest(
        rid="a", input_ids=token_ids([1]), sampling=SamplingParams(), arrival_s=0.0
    )
    with pytest.raises(AttributeError):
        request.rid = "b"  # type: ignore[misc]
