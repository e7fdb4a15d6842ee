"""On simulated CUDA devices the library decides by device as on a GPU, and computes the same.

Cases run in a process of their own, whose torch has a device ``cuda:0``; see
support/simulated_cuda.py. Faults are planted, each of which must show.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed, so auto has nothing to choose from")

from support import simulated_cuda
from support.simulated_cuda_cases import CASES

KERNELS = ("triton", "cuda")
NO_FLOAT64 = "a tensor is float64, the kernels are float32, bfloat16, float16; use 'auto'"
NOT_ON_CUDA = "conv: a tensor is on cuda, the kernels run on the CPU; use 'auto'"
NOT_ON_CPU = "conv: a tensor is on cpu, the kernels run on a GPU; use 'auto'"
TWO_DEVICES = (
    "RuntimeError: Expected all tensors to be on the same device, but found at least two devices"
)
# What a step must launch, whichever tiles and parts it takes.
KERNELS_OF_A_STEP = {
    "triton": {
        "_act_bwd_kernel",
        "_gan_loss_fwd_kernel",
        "_bn_act_bwd_kernel",
        "_bn_act_fwd_kernel",
        "_bn_running_kernel",
        "_conv_dgrad_kernel",
        "_conv_fprop_kernel",
        "_conv_wgrad_kernel",
    },
    "cuda": {
        "act_backward",
        "gan_loss_forward",
        "bn_act_backward",
        "bn_act_forward",
        "bn_update_running",
        "conv_dgrad",
        "conv_fprop",
        "conv_wgrad",
    },
}
BATCH = ["to_device aten::copy_ Float [3, 1, 16, 16]"]
BYTES = "to_device pinned aten::copy_ Byte [3, 16, 16, 1]"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each case found, by its name."""
    if reason := simulated_cuda.missing_reason():
        pytest.skip(f"CUDA cannot be simulated here: {reason}")
    env = {name: value for name, value in os.environ.items() if name != "FASTGAN_BACKEND"}
    env |= {
        # A real GPU is not to be found beside the simulated one.
        "CUDA_VISIBLE_DEVICES": "",
        "FASTGAN_CACHE": str(tmp_path_factory.mktemp("cache")),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent),
        "TRITON_INTERPRET": "1",
    }
    command = [sys.executable, "-m", "support.simulated_cuda_cases", *CASES]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.fixture
def result(results):
    def of(name):
        assert "raised" not in results[name], results[name]["raised"]
        return results[name]

    return of


def backends(launches):
    return {backend for backend, _ in launches}


@pytest.mark.parametrize("backend", ["triton", "cuda", "auto"])
def test_a_step_computes_what_the_reference_does(result, backend):
    """Two steps with a moving average, in float32, against float64 on the CPU."""
    found = result(f"step {backend}")
    assert found["error"] < 2e-6
    # That is what auto is told to have measured fastest.
    taken = "cuda" if backend == "auto" else backend
    assert backends(found["launches"]) == {taken}
    assert KERNELS_OF_A_STEP[taken] <= {name for _, name in found["launches"]}


def test_a_step_of_the_reference(result):
    """In float64, but for the learning rate, which torch's fused Adam has in float32 on a GPU."""
    found = result("step reference")
    assert found["error"] < 1e-7
    assert found["launches"] == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_in_half_precision(result, precision):
    found = result(f"step {precision}")
    assert found["first losses"] < 2e-3
    assert backends(found["launches"]) == {"cuda"}


@pytest.mark.parametrize("way", ["reference", "triton", "cuda", "auto", "bf16", "fp16"])
def test_a_step_neither_waits_nor_copies(result, way):
    found = result(f"step {way}")
    assert found["notes"] == []
    assert found["on_main_thread"]


@pytest.mark.parametrize("fastest", KERNELS)
def test_auto_takes_what_measured_fastest(result, fastest):
    for op, found in result(f"ops auto {fastest}").items():
        assert found["error"] < 2e-6, op
        assert backends(found["launches"]) == {fastest}, op


def test_auto_takes_torchs_convolution_where_that_is_fastest(result):
    found = result("ops auto torch")
    assert found["conv"]["error"] < 2e-6
    # Of the activation, which torch has none for.
    assert found["conv"]["launches"] == [["cuda", "act_backward"]]


def test_auto_leaves_other_dtypes_to_the_reference(result):
    for op, found in result("ops auto float64").items():
        assert found["error"] < 1e-12, op
        assert found["launches"] == [], op


@pytest.mark.parametrize("backend", KERNELS)
def test_a_named_backend_refuses_other_dtypes(result, backend):
    found = result(f"ops {backend} float64")
    for op in ("conv", "bn_act", "gan_loss"):
        assert found[op] == {"raised": f"NotBuiltError: backend='{backend}': {op}: {NO_FLOAT64}"}
    # What it makes of bytes in another dtype is for torch.
    assert found["augment"]["launches"] == []


def test_cpp_by_the_environment_is_refused_on_cuda(result):
    found = result("cpp by the environment")
    refused = f"NotBuiltError: backend='cpp': {NOT_ON_CUDA}, and unset FASTGAN_BACKEND"
    assert found["conv"] == found["step"] == refused
    assert found["augment"] == "cuda:0"


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_torch_refuses_mixed_devices(result, backend):
    assert result("mixed devices")[backend].startswith(f"{TWO_DEVICES}, cuda:0 and cpu!")


@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_refuse_mixed_devices(result, backend):
    expected = f"NotBuiltError: backend='{backend}': {NOT_ON_CPU}"
    assert result("mixed devices")[backend] == expected


def test_the_simulation_refuses_mixed_devices(result):
    found = result("mixed devices")
    assert found["torch"].startswith(f"{TWO_DEVICES}, cuda:0 and cpu!")
    assert found["devices"].startswith(f"{TWO_DEVICES}, cuda:0 and cuda:1!")
    assert found["weights"].startswith(f"{TWO_DEVICES}, cuda:0 and cpu!")


def test_what_is_handed_in_from_the_host_is_moved(result):
    found = result("handed in from the host")
    assert found["both"] == [*BATCH, "to_device aten::copy_ Float [3, 6, 1, 1]"]
    assert found["pixels"] == ["to_device aten::copy_ Byte [3, 16, 16, 1]"]
    assert found["devices"] == ["cuda:0"]


def test_numbers_are_read_at_once(result):
    assert result("handed in from the host")["to_dict"] == ["to_host aten::copy_ Float [5]"]


@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_follow_their_tensors_to_a_second_device(result, backend):
    found = result("second device")
    assert found["device"] == "cuda:1"
    assert found[backend] == ["cuda:1", [1]]
    assert found["present"] == 0


@pytest.mark.parametrize("fault", ["triton, another device", "cuda, another device"])
def test_a_launch_on_another_device_shows(result, fault):
    assert "of device 0 is given {1}" in result("second device")[fault]


def test_a_launch_on_another_stream_shows(result):
    assert "another device's stream" in result("second device")["cuda, another stream"]


@pytest.mark.parametrize("where", ["resident", "not resident"])
@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_the_loader_makes_the_same_batches(result, backend, where):
    found = result(f"loader {backend} {where}")
    assert all(found["same"])
    assert found["launches"] == [["cuda"]] * len(found["same"])


def test_images_that_fit_are_kept_on_the_device(result):
    found = result("loader auto resident")
    assert "to_device aten::copy_ Byte [8, 16, 16, 1]" in found["made"]
    assert not any("Byte" in note for notes in found["batches"] for note in notes)


def test_images_that_do_not_fit_are_copied_from_pinned_memory(result):
    found = result("loader auto not resident")
    assert not any("Byte" in note for note in found["made"])
    for i, notes in enumerate(found["batches"]):
        # The last batch of an epoch has what is left.
        assert BYTES.replace("[3,", "[2," if i == 2 else "[3,") in notes


@pytest.mark.parametrize("where", ["resident", "not resident"])
def test_the_loader_does_not_wait(result, where):
    for notes in result(f"loader auto {where}")["batches"]:
        assert all(note.startswith("to_device") for note in notes)


def test_a_step_with_a_loader_does_not_wait(result):
    assert all(n.startswith("to_device") for n in result("attached loader")["notes"])


def test_devices_are_resolved(result):
    found = result("devices")
    for asked in ("auto", "cuda", "cuda:0", "of a network"):
        assert found[asked] == "cuda:0", asked
    assert found["cpu"] == found["auto without a GPU"] == "cpu"


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("cuda:1", "invalid device ordinal"),
        ("meta", "it is not a device to train on"),
        ("xpu", "Torch not compiled with XPU enabled"),
        ("nowhere", "Expected one of cpu, cuda"),
    ],
)
def test_devices_that_are_not_there_are_refused(result, device, reason):
    found = result("devices")[device]
    assert found.startswith(f"InputError: device='{device}' cannot be used here: ")
    assert reason in found


def test_a_checkpoint_goes_on_on_another_device(result):
    found = result("checkpoint")
    assert found["same on the CPU"]
    assert found["same back on the device"]
    assert found["where"] == ["cuda:0"]
    assert found["said"] == [
        "the state comes from cuda and goes on on cpu: with other random numbers from here"
    ]


def test_a_checkpoint_goes_on_on_the_same_device_as_if_it_had_never_stopped(result):
    found = result("checkpoint")
    assert found["same on the device"]
    assert found["goes on"]
    assert found["goes on from the device's tensors"]
    assert found["said on the same device"] == []


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 1e-2), ("float16", 1.5e-3)])
@pytest.mark.parametrize("backend", ["auto", "reference", "triton", "cuda"])
def test_autocast_of_the_device(result, backend, dtype, limit):
    """A block of D and the loss: the output is of autocast's dtype, the rest float32."""
    found = result(f"autocast {backend} {dtype}")
    assert found["dtypes"] == [dtype] + ["float32"] * 5
    assert max(found["errors"]) < limit
    launched = {backend for backend, _ in found["launches"]}
    assert launched == ({"triton", "cuda"} if backend == "auto" else {backend} - {"reference"})


@pytest.mark.parametrize(
    ("fault", "shows"),
    [
        ("item", "wait aten::_local_scalar_dense Float []"),
        ("cpu", "to_host aten::copy_ Float [6]"),
        ("cpu", "to_device aten::copy_ Float [6]"),
        ("mask", "wait aten::index Bool [6]"),
        ("number", "number aten::mul Float []"),
    ],
)
def test_a_loss_that_goes_to_the_host_shows(result, fault, shows):
    found = result(f"fault: {fault}")
    assert found["was"] == "nothing was raised"
    assert shows in found["notes"]


def test_a_tensor_that_is_left_on_the_host_raises(result):
    assert result("fault: left on the CPU")["was"].startswith(TWO_DEVICES)


def test_a_learning_rate_that_the_gpu_cannot_read_raises(result):
    assert "expected scalar type Float but found Double" in result("fault: rate")["was"]


@pytest.mark.parametrize(
    ("backend", "raised"),
    [("triton", "cannot be accessed from Triton"), ("cuda", "an illegal memory access")],
)
def test_a_kernel_that_is_given_memory_of_the_host_raises(result, backend, raised):
    assert raised in result(f"fault: output {backend}")["was"]


def test_backward_in_another_thread_shows(result):
    """Where autograd may, it takes one for the device, as on a GPU."""
    on_main_thread = result("fault: threads")["on_main_thread"]
    assert True in on_main_thread
    assert False in on_main_thread
