"""Checkpoint files are read as data: everything else is refused by name, and nothing of it runs."""

from __future__ import annotations

import argparse
import builtins
import collections
import io
import os
import pathlib
import pickle
import struct
import subprocess
import zipfile

import numpy as np
import pytest
import torch

from megatron_groupmates.checkpoint.constructors import Record
from megatron_groupmates.checkpoint.unpickle import load
from megatron_groupmates.config.errors import UserError


class Call:
    """Pickles to a call of ``function`` with ``arguments``."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def saved(tmp_path, value, protocol=2) -> pathlib.Path:
    torch.save(value, tmp_path / "file.pt", pickle_protocol=protocol)
    return tmp_path / "file.pt"


def with_pickle(tmp_path, content: bytes) -> pathlib.Path:
    """A torch.save file whose pickle is ``content``."""
    with zipfile.ZipFile(tmp_path / "file.pt", "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("file/data.pkl", content)
        archive.writestr("file/data/0", bytes(16))
    return tmp_path / "file.pt"


def test_tensors_and_containers_come_back(tmp_path):
    base = torch.randn(6, 4)
    dtypes = (torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)
    value = {
        "view": base.t()[1:],
        "base": base,
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 5),
        "parameter": torch.nn.Parameter(base + 1),
        "dtypes": [torch.ones(3, dtype=dtype) for dtype in dtypes],
        "plain": (
            1,
            -(2**70),
            2.5,
            True,
            None,
            "text",
            b"bytes",
            b"",
            {1, 2},
            frozenset({3}),
            bytearray(b"x"),
            1j,
            torch.Size([2, 3]),
            torch.float32,
        ),
        "ordered": collections.OrderedDict(a=1),
        "default": collections.defaultdict(list, {"k": [1]}),
        "path": pathlib.PosixPath("/a/b"),
    }
    found = load(saved(tmp_path, value))
    assert found.keys() == value.keys()
    for name in ("view", "base", "scalar", "empty", "parameter"):
        assert torch.equal(found[name], value[name].detach())
    assert found["view"].untyped_storage().data_ptr() == found["base"].untyped_storage().data_ptr()
    for ours, theirs in zip(found["dtypes"], value["dtypes"], strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours.float(), theirs.float())
    assert found["plain"] == value["plain"]
    assert found["ordered"] == value["ordered"] and found["default"] == {"k": [1]}
    assert found["path"] == pathlib.PurePosixPath("/a/b")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(tmp_path, protocol):
    value = {"a": [1, 2.5, ("x", None)], "long": "y" * 300, "bytes": b"z" * 300, "set": {1}, "same": [[]] * 2}
    found = load(saved(tmp_path, value, protocol))
    assert found == value
    assert found["same"][0] is found["same"][1]


def test_a_tensor_with_attributes(tmp_path):
    tensor = torch.arange(4.0)
    tensor.tensor_model_parallel = True
    assert torch.equal(load(saved(tmp_path, tensor)), tensor)


def test_numpy_values(tmp_path):
    state = np.random.RandomState(3).get_state()
    values = {
        "state": state,
        "scalar": np.float64(2.5),
        "matrix": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "text": np.array(["ab", "c"]),
    }
    found = load(saved(tmp_path, values))
    assert found["scalar"] == 2.5
    for ours, theirs in zip(found["state"], state, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(found["matrix"], values["matrix"])
    np.testing.assert_array_equal(found["text"], values["text"])


def test_objects_become_records(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    scaler = DynamicLossScaler(
        dtype=torch.float16,
        init_scale=8.0,
        scale_window=1000,
        min_scale=1,
        delayed_shift=1,
        consecutive_hysteresis=False,
        raise_error_at_min_scale=True,
    )
    found = load(
        saved(
            tmp_path,
            [argparse.Namespace(num_layers=2, nested={"a": 1}), ZeroStageEnum.gradients, fragment_address(numel=5, start=7), scaler],
        )
    )
    assert [type(item) for item in found] == [Record] * 4
    assert found[0].fields == {"num_layers": 2, "nested": {"a": 1}}
    assert (found[1].type_name, found[1].args) == ("deepspeed.runtime.zero.config.ZeroStageEnum", (2,))
    assert found[2].fields == {"numel": 5, "start": 7}
    assert found[3].fields["cur_scale"] == 8.0


HOSTILE = {
    "os.system": (lambda mark: Call(os.system, f"touch {mark}"), "posix.system"),
    "eval": (lambda mark: Call(eval, f"open({str(mark)!r}, 'w')"), "builtins.eval"),
    "exec": (lambda mark: Call(exec, f"open({str(mark)!r}, 'w')"), "builtins.exec"),
    "getattr": (lambda mark: Call(getattr, Call(__import__, "os"), "system"), "builtins.getattr"),
    "import": (lambda mark: Call(__import__, "antigravity"), "builtins.__import__"),
    "open": (lambda mark: Call(open, str(mark), "w"), "io.open"),
    "Popen": (lambda mark: Call(subprocess.Popen, ["touch", str(mark)]), "subprocess.Popen"),
    "nested torch.load": (lambda mark: Call(torch.load, str(mark)), "torch.serialization.load"),
    "nested pickle": (lambda mark: Call(pickle.loads, pickle.dumps(Call(os.system, f"touch {mark}"))), "_pickle.loads"),
    "rebuild through a function": (
        lambda mark: Call(torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (f"touch {mark}",), {}),
        "posix.system",
    ),
    "rebuild through a listed class": (
        lambda mark: Call(torch._tensor._rebuild_from_type_v2, argparse.Namespace, torch.Tensor, (), {}),
        "argparse.Namespace",
    ),
    "function as a state": (lambda mark: Call(argparse.Namespace, state={"f": os.system}), "posix.system"),
    "map": (lambda mark: [Call(map, os.system, [f"touch {mark}"])], "builtins.map"),
    "a class of the caller": (lambda mark: io.StringIO("x"), "_io.StringIO"),
    "bytes of another codec": (lambda mark: Call(__import__("_codecs").encode, "x", "rot13"), "_codecs.encode to 'rot13'"),
    "numpy objects": (lambda mark: np.array([{}], dtype=object), "numpy dtype 'O8'"),
    "numpy void": (lambda mark: np.zeros(1, dtype=[("a", "i4")]), "numpy dtype 'V4'"),
}


# Protocol 2 writes some of the names as Python 2 had them.
PYTHON_2_NAMES = {"subprocess.Popen": "commands.Popen", "_pickle.loads": "pickle.loads", "builtins.map": "itertools.imap"}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_by_name(tmp_path, name, protocol):
    mark = tmp_path / "mark"
    make, refused = HOSTILE[name]
    path = saved(tmp_path, {"module": {"weight": torch.zeros(2)}, "x": make(mark)}, protocol)
    with pytest.raises(UserError) as error:
        load(path)
    named = PYTHON_2_NAMES.get(refused, refused) if protocol == 2 else refused
    assert f"{path}: refused: the file wants to create or call '{named}'" in str(error.value)
    assert "Nothing of it was run" in str(error.value)
    assert not mark.exists()


def test_the_hostile_payloads_are_real(tmp_path):
    mark = tmp_path / "mark"
    torch.load(saved(tmp_path, HOSTILE["os.system"][0](mark)), weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02cbuiltins\neval\n.", "builtins.eval"),
        (b"\x80\x02c__builtin__\neval\n.", "builtins.eval"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "posix.system"),
        (b"\x80\x04\x8c\x05torch\x8c\x12serialization.load\x93.", "torch.serialization.load"),
        (b"(iposix\nsystem\n.", "pickle instruction INST"),
        (b"(cargparse\nNamespace\no.", "pickle instruction OBJ"),
        (b"\x80\x02\x82\x01.", "pickle instruction EXT1"),
        (b"P0\n.", "pickle instruction PERSID"),
        (b"\x80\x04cargparse\nNamespace\n)}\x92.", "pickle instruction NEWOBJ_EX"),
    ],
)
def test_hostile_instructions(tmp_path, content, message):
    with pytest.raises(UserError, match=f"refused: the file wants to create or call '{message}'"):
        load(with_pickle(tmp_path, content))


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02]", "pickle exhausted before seeing STOP"),
        (b"\x80\x02\xff.", "opcode"),
        (b"\x80\x02a.", "is damaged"),
        (b"\x80\x02K\x01K\x02R.", "call of int with int"),
        (b"\x80\x02cargparse\nNamespace\nK\x01R.", "call of Name with int"),
        (b"\x80\x02cargparse\nNamespace\n(K\x01K\x02e.", "APPENDS on Name"),
        (b"\x80\x02ctorch\nSize\n}b.", "state for Name"),
        (b"\x80\x02cbuiltins\nbytes\nJ\x00\x00\x00\x7f\x85R.", "bytes from int"),
        (b"\x80\x02K\x01Q.", "is damaged"),
        (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00K\x05\x85K\x01\x85\x89}tR.",
            "ends at element 4 of a storage of 4",
        ),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"J\xff\xff\xff\xffK\x01\x85K\x01\x85\x89}tR.", "offset -1"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00K\x05\x85K\x01\x85\x89}tR.", "a tensor of int"),
        (b"\x80\x02" + STORAGE.replace(b"K\x04", b"K\x05") + b".", "storage 0 holds 16 bytes instead of 5 x 4"),
        (b"\x80\x02" + STORAGE.replace(b"0X\x03", b"7X\x03") + b".", "no record 'data/7'"),
    ],
)
def test_damaged_pickles(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        load(with_pickle(tmp_path, content))


@pytest.mark.parametrize("kept", [0, 100, 0.5, -1])
def test_truncated_files(tmp_path, kept):
    path = saved(tmp_path, {"weight": torch.randn(2000)})
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match=rf"{path} is cut short \({path.stat().st_size} bytes\)"):
        load(path)


def test_files_of_another_kind(tmp_path):
    with pytest.raises(UserError, match=r"checkpoint file .*absent.pt does not exist"):
        load(tmp_path / "absent.pt")
    torch.save({"a": 1}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"legacy.pt is not a zip file of torch.save; .*checkpoint_serialization"):
        load(tmp_path / "legacy.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("file/readme", "x")
    with pytest.raises(UserError, match=r"other.pt is a zip file, but not one that torch.save wrote"):
        load(tmp_path / "other.pt")
    with zipfile.ZipFile(tmp_path / "compressed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("file/data.pkl", pickle.dumps([0] * 1000))
    with pytest.raises(UserError, match=r"compressed.pt was compressed after it was saved"):
        load(tmp_path / "compressed.pt")
    with zipfile.ZipFile(tmp_path / "big.pt", "w") as archive:
        archive.writestr("file/data.pkl", pickle.dumps(1))
        archive.writestr("file/byteorder", "big")
    with pytest.raises(UserError, match=r"big.pt was written on a big-endian machine"):
        load(tmp_path / "big.pt")


def test_a_record_that_is_not_where_the_directory_says(tmp_path):
    path = saved(tmp_path, {"weight": torch.randn(2000)})
    content = bytearray(path.read_bytes())
    content[:4] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"file.pt is damaged: record 'data.pkl' is not where"):
        load(path)


def test_a_record_longer_than_the_file(tmp_path):
    path = with_pickle(tmp_path, pickle.dumps(1))
    content = bytearray(path.read_bytes())
    entry = content.find(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = struct.pack("<I", 10**6)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"file.pt is damaged: record 'data.pkl' ends at byte 1000\d+, the file at"):
        load(path)


def test_reading_part_of_a_tensor_maps_only_that_part(tmp_path):
    path = saved(tmp_path, torch.zeros(64 * 2**18))  # 64 MiB

    def resident() -> int:
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    tensor = load(path)
    assert tensor[1000:2000].sum() == 0
    assert resident() - before < 2**24


def test_the_list_names_no_builtin_that_acts():
    from megatron_groupmates.checkpoint.constructors import CONSTRUCTORS

    acting = {"eval", "exec", "compile", "open", "getattr", "setattr", "__import__", "map", "filter", "type", "vars", "globals", "input"}
    assert acting <= set(dir(builtins))
    assert not {f"builtins.{name}" for name in acting} & CONSTRUCTORS.keys()
