"""PdmuxConfig: the file behind --pdmux-config-path, checked once and frozen.

    sm_group_num: 8
    manual_divisions:            # [prefill SMs, decode SMs, smallest decode batch it is for]
      - [112, 20, 1]
      - ...                      # sm_group_num - 2 rows, thresholds rising
    split_forward_token_budget: 65536
    decode_bs_divisor: 36

Two of the groups are the whole device for one phase alone, so the rows are two fewer. Without
`manual_divisions` the server chooses the partitions.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from sglang.srt.errors import ConfigError
from sglang.srt.flags import read_yaml_mapping

DEFAULT_SM_GROUP_NUM = 8
MIN_SM_GROUP_NUM = 3


class Division(NamedTuple):
    """One split of the device, for decode batches of at least `min_decode_reqs` requests.

    A batch smaller than the first row's threshold uses the first row.
    """

    prefill_sms: int
    decode_sms: int
    min_decode_reqs: int


class PdmuxConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the device is divided between prefill and decode.

    sm_group_num: partitions, the two whole-device ones included.
    manual_divisions: the split ones, by rising decode batch; empty lets the server choose.
    split_forward_token_budget: prompt tokens x layers in one prefill launch.
    decode_bs_divisor: decode batch size at which the last automatic division is reached.
    """

    sm_group_num: int = DEFAULT_SM_GROUP_NUM
    manual_divisions: tuple[Division, ...] = ()
    split_forward_token_budget: int = 65536
    decode_bs_divisor: int = 36

    @classmethod
    def load(cls, path: str | Path | None, sm_group_num: int | None = None) -> PdmuxConfig:
        """Reads the YAML file, or takes the defaults when `path` is None.

        sm_group_num: the value of --sm-group-num, None when it was not given.
        Raises ConfigError naming the file and the key.
        """
        source = "--sm-group-num" if path is None else str(path)
        content = {} if path is None else read_yaml_mapping(Path(path))
        in_file = content.get("sm_group_num")
        if sm_group_num is not None:
            if in_file is not None and in_file != sm_group_num:
                raise ConfigError(
                    f"--sm-group-num {sm_group_num} contradicts sm_group_num: {in_file} in {path}; "
                    "leave one of them out"
                )
            content = content | {"sm_group_num": sm_group_num}
        return cls._parse(content, source)

    @classmethod
    def _parse(cls, content: dict[Any, Any], source: str) -> PdmuxConfig:
        for key in content:
            if key not in cls.__struct_fields__:
                known = ", ".join(cls.__struct_fields__)
                raise ConfigError(f"{source}: unknown key {key}; known are {known}")
        try:
            config = msgspec.convert(content, cls)
        except msgspec.ValidationError as error:
            reason, _, where = str(error).partition(" - at `$.")
            raise ConfigError(f"{source}: {where.rstrip('`')}: {reason}") from None
        config._check(source)
        return config

    def _check(self, source: str) -> None:
        def require(ok: bool, key: str, problem: str) -> None:
            if not ok:
                raise ConfigError(f"{source}: {key} {problem}")

        require(
            self.sm_group_num >= MIN_SM_GROUP_NUM,
            "sm_group_num",
            f"must be at least {MIN_SM_GROUP_NUM} (two of the groups are the whole device), "
            f"got {self.sm_group_num}",
        )
        require(
            self.split_forward_token_budget >= 1,
            "split_forward_token_budget",
            f"must be at least 1, got {self.split_forward_token_budget}",
        )
        require(
            self.decode_bs_divisor >= 1,
            "decode_bs_divisor",
            f"must be at least 1, got {self.decode_bs_divisor}",
        )
        rows = self.manual_divisions
        if not rows:
            return
        require(
            len(rows) == self.sm_group_num - 2,
            "manual_divisions",
            f"must have sm_group_num - 2 = {self.sm_group_num - 2} rows, got {len(rows)}",
        )
        for i, row in enumerate(rows):
            require(
                row.prefill_sms >= 1 and row.decode_sms >= 1 and row.min_decode_reqs >= 0,
                f"manual_divisions[{i}]",
                f"needs at least one SM a phase and a threshold of 0 or more, got {list(row)}",
            )
        thresholds = [row.min_decode_reqs for row in rows]
        require(
            all(low < high for low, high in itertools.pairwise(thresholds)),
            "manual_divisions",
            f"must have rising thresholds (third column), got {thresholds}",
        )
