"""The Triton kernels without a GPU: compiled ahead of time, read, counted; and that the reader sees what is wrong.

Triton's compiler and its interpreter exclude each other, so what compiles has a process of its own. The grid is trimmed
to one GPU, the smallest model, the rows of decoding, drafting and verifying, one step of quantised weights, and what
draws tokens: two minutes; a step or two for each other GPU: one more. `make gpu-static` compiles for all GPUs at the
shapes of all models.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from math import prod
from pathlib import Path

import pytest

from layerskip_kernels.triton_ops.quantised import BY_SEGMENT, KINDS

ROOT = Path(__file__).parents[2]
HARNESS = ROOT / "benchmarks" / "compile_only"
CASES = ["bf16,dependent,1", "bf16,decode,1", "bf16,draft,1", "bf16,verify,7", "bf16,prompt,64"]
CASES += ["q4_k_m,verify,7", "q4_k_m,dependent,1", "fp32,sampling,7"]
# AMD's GPUs multiply integers by instructions of their own.
OF_OTHERS = {"sm_80": ["bf16,decode,1"], "sm_100": ["bf16,decode,1"], "gfx942": ["bf16,decode,1", "int8,verify,1"]}


def load(name):
    spec = importlib.util.spec_from_file_location(name, HARNESS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


asm, gpu_static = load("gpu_assembly"), load("gpu_static")


# ---- what the steps compile to ----


def compiled(folder, target, cases):
    options = [option for case in cases for option in ("--case", f"llama3.2-1b,{case}")]
    command = [sys.executable, HARNESS / "gpu_static.py", "--target", target, *options, "--json", folder / "r.json"]
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads((folder / "r.json").read_text())


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("gpu_static"), "sm_90", CASES)


@pytest.mark.parametrize("target", OF_OTHERS)
def test_steps_of_other_gpus(target, tmp_path):
    """Each of their kernels was read, and is as it must."""
    found = compiled(tmp_path, target, OF_OTHERS[target])
    assert [f"{s['target']},{s['dtype']},{s['kind']},{s['rows']}" for s in found["steps"]] == [
        f"{target},{case}" for case in OF_OTHERS[target]
    ]
    for step in found["steps"]:
        kernels = [kernel for kernel in found["kernels"] if kernel["dtype"] == step["dtype"]]
        streaming = [kernel for kernel in kernels if kernel["name"] in gpu_static.STREAMING]
        assert {kernel["name"] for kernel in streaming} == set(gpu_static.STREAMING)
        assert all(set(kernel["widths"]) == {"16"} for kernel in streaming)
        assert "_attend_kernel" in {kernel["name"] for kernel in found["kernels"]}
    assert not [entry for entry in (*found["kernels"], *found["steps"]) if entry["problems"]]


def test_every_kernel_of_the_steps_was_read(report):
    kernels = {(kernel["name"], kernel["rows"]) for kernel in report["kernels"]}
    for name in gpu_static.STREAMING:
        assert {(name, 1), (name, 8)} <= kernels
    assert {name for name, _ in kernels} >= {"_join_rows_kernel", "_attend_kernel", "_merge_kernel",
                                             "_accept_draft_kernel", "_take_draft_kernel", "_take_target_kernel",
                                             "_scale_kernel", "_count_kernel", "_choose_kernel", "_add_masses_kernel",
                                             "_residual_kernel", "_settle_kernel", "_edit_kernel"}  # fmt: skip
    assert not [kernel for kernel in report["kernels"] if kernel["problems"]]


def test_weights_stream_sixteen_bytes_at_a_time(report):
    for kernel in report["kernels"]:
        if kernel["name"] in gpu_static.STREAMING and kernel["rows"] < 64:
            assert set(kernel["widths"]) == {"16"} and kernel["sectors"] == 1
            assert kernel["in_flight"] >= kernel["wanted"] / 3


def test_prompts_go_through_tiles(report):
    """Of all products but the head's, which has one row; rows are turned four times a layer."""
    of_prompts = {kernel["name"]: kernel for kernel in report["kernels"] if kernel["rows"] == 64}
    found = {name: kernel for name, kernel in of_prompts.items() if name in gpu_static.STREAMING}
    assert set(found) == set(gpu_static.STREAMING) - {"_head_kernel"} and "_turn_rows_kernel" in of_prompts
    for kernel in found.values():
        assert set(kernel["widths"]) == {"16"} and kernel["loop"]["FFMA"] == 16 * 32 and kernel["resident"] >= 2
        assert not {"LDL", "STL", "FMUL", "FADD"} & set(kernel["loop"])
    (step,) = (step for step in report["steps"] if step["kind"] == "prompt")
    assert step["roundings"] == 4 * step["layers"]


def test_only_dots_and_attention_fuse(report):
    fused = {kernel["name"] for kernel in report["kernels"] if kernel["multiply_adds"] and kernel["dtype"] == "bf16"}
    assert fused == set(gpu_static.MAY_FUSE)


def test_the_launches_of_steps(report):
    """Launches a step, with one chunk of attention to merge: 16 layers decoding and verifying, 2 drafting."""
    steps = [step for step in report["steps"] if step["dtype"] == "bf16" and step["kind"] != "prompt"]
    steps = {step["kind"]: step for step in steps if not step["dependent"]}
    for step in steps.values():
        assert step["launches"] - step["besides"] == gpu_static.MAX_PER_LAYER * step["layers"]
        assert abs(step["bytes"] - step["paper"]) <= gpu_static.TOLERANCE * step["paper"]
        assert step["again"] == 0
    assert {kind: (step["layers"], step["besides"]) for kind, step in steps.items()} == {
        "decode": (16, 3),  # join, head, accept
        "draft": (2, 3),  # join, head, take
        "verify": (16, 4),  # rows join at two depths
    }


def test_kernels_ask_for_weights_before_they_wait_for_the_one_ahead(report):
    """qkv, output, gate and up, and down of each layer, and the head; PTX and SASS were read for it. Of quantised
    weights, whoever rounds the rows for them begins early, too."""
    steps = {step["dtype"]: step for step in report["steps"] if step["dependent"]}
    assert {dtype: (step["layers"], step["dependent"]) for dtype, step in steps.items()} == {
        "bf16": (16, 4 * 16 + 1),
        "q4_k_m": (16, 2 * (4 * 16 + 1)),
    }


def test_quantised_weights_are_multiplied_as_they_are_loaded(report):
    """By integer MMAs, with no word between threads and no contracted product; rows are rounded four times a layer."""
    kernels = [kernel for kernel in report["kernels"] if kernel["dtype"] == "q4_k_m"]
    found = {kernel["name"]: kernel for kernel in kernels if kernel["name"] in gpu_static.STREAMING}
    assert set(found) == set(gpu_static.STREAMING) and all(kernel["loop"]["IMMA"] for kernel in found.values())
    assert {kernel["name"] for kernel in kernels if kernel["multiply_adds"]} <= {"_attend_kernel"}
    (step,) = (step for step in report["steps"] if step["dtype"] == "q4_k_m" and not step["dependent"])
    assert step["roundings"] == 4 * step["layers"] + 1


def test_threads_that_exchange_what_they_loaded_are_seen():
    judge, loop = gpu_static.integer_problems, {"IMMA": 4}
    assert not judge("sm_90", {}, loop, {16: 2})
    assert judge("sm_90", {}, {}, {16: 2})
    assert judge("sm_90", {}, loop | {"STS": 1}, {16: 2})
    assert judge("sm_90", {}, loop | {"BAR": 1}, {16: 2})
    assert judge("sm_90", {}, loop, {8: 2})
    assert judge("gfx942", {"amdgcn": "v_mfma_f32_16x16x16_bf16"}, {}, {})
    assert not judge("gfx942", {"amdgcn": "v_mfma_i32_16x16x32_i8"}, {}, {})


def test_instructions_of_a_position_are_counted():
    def judge(rows, instructions, **ops):
        loop = Counter({"FADD": 32, "FFMA": 32, **ops})
        loop["LDG"] = instructions - loop.total()
        return gpu_static.position_problems(rows, 32, [Counter({"FFMA": 64}), loop])

    assert not judge(1, 14 * 32) and judge(1, 15 * 32)
    assert not judge(8, 35 * 32) and judge(8, 36 * 32)
    assert not judge(8, 35 * 32, FFMA=0, FFMA2=128) and judge(8, 36 * 32, FFMA=0, FFMA2=128)  # two at a time: sm_100
    assert judge(1, 10 * 32, FADD=2) == judge(1, 10 * 32, FMUL=2) == ["no loop over V was found"]


def test_loops_of_attention_that_are_no_tiles_are_seen():
    arguments = dict(R=64, TILE=128, K_PADDED=64, num_warps=8)
    of_k, of_v = Counter(FFMA=512, LDS=80), Counter(FFMA=256, LDS=80, LDG=40)

    def judge(*loops, chains=(16, 16), problems=()):
        return gpu_static.attention_tile_problems(asm.TileLoop([*chains], Counter(), [*problems]), arguments, [*loops])

    assert not judge(of_k, of_v, of_k + of_v, problems=["beside the chains: add.rn.f32"])
    assert judge(of_k) and judge(of_v)
    assert judge(of_k, of_v + Counter(LDL=1)) and judge(of_k + Counter(LDG=300), of_v)
    assert judge(of_k, of_v, chains=(16, 8)) and judge(of_k, of_v, problems=["a sum is used twice"])


def test_a_norm_that_waits_for_each_load_is_seen():
    def judge(rows, *loads):
        return gpu_static.norm_problems(
            rows, [Counter({"FFMA": 8, "LDG": 1}), *(Counter(FMUL=4, LDG=n) for n in loads)]
        )

    assert not judge(1, 16, 32) and judge(1, 16, 2)
    assert not judge(8, 8, 12) and judge(8, 4, 12)
    assert judge(1, 16) == ["1 loops of a norm, not 2"]
    assert not gpu_static.norm_problems(8, [Counter(FFMA2=8, LDG=1), *(Counter(FMUL2=4, LDG=n) for n in (8, 12))])


NORM_LOOP = """
.L_x_3:
        /*0000*/                   LDG.E.64.STRONG.GPU R4, desc[UR4][R2.64] ;
        /*0010*/                   FMUL R5, R4, R5 ;
        /*0020*/              @!P0 STG.E.128 desc[UR4][R2.64], R4 ;
        /*0030*/               @P1 BRA `(.L_x_3) ;
"""


@pytest.mark.parametrize(
    ("store", "problem"),
    [
        ("STG.E.128 desc[UR4][R2.64], R4", None),
        ("STG.E desc[UR4][R2.64], R4", "a norm stores 4 bytes a thread at once, not 16"),
        ("STG.E.64 desc[UR4][R2.64], R4", "a norm stores 8 bytes a thread at once, not 16"),
        ("STG.E.U16 desc[UR4][R2.64], R4", "a norm stores 2 bytes a thread at once, not 16"),
        ("STG.E.EF.64 desc[UR4][R2.64], R4", "a norm stores 8 bytes a thread at once, not 16"),
        ("STG.E.128 [R2.64], R4 ;\n        /*0028*/ BAR.SYNC.DEFER_BLOCKING 0x0", "1 barriers in a norm's loop"),
        ("NOP", "no loop of a norm that stores was found"),
    ],
)  # fmt: skip
def test_a_norm_that_stores_few_bytes_at_once_or_waits_for_threads_is_seen(store, problem):
    sass = NORM_LOOP.replace("STG.E.128 desc[UR4][R2.64], R4", store)
    found = gpu_static.norm_store_problems(asm.sass_loops(sass), asm.sass_stores(sass))
    assert found == ([] if problem is None else [problem])


WAITS = """
import sys
sys.path[:0] = sys.argv[1:3]
import torch, gpu_compile
for line in sys.argv[3:]:
    x, y = torch.empty(4, device="meta"), torch.empty(4, device="meta")
    with gpu_compile.StaysOnDevice():
        x[1:].copy_(y[:3])
        try:
            exec(line)
        except (RuntimeError, NotImplementedError):
            continue
    print("not seen:", line)
"""
LINES = ["x.tolist()", "bool(x[0])", "x.nonzero()", "x.to('cpu')", "torch.ones(3, device='cpu')", "torch.ones(3).sum()"]
LINES += ["torch.empty_like(x)", "torch.zeros(3, device='meta')", "x.clone()", "x + x"]


def test_a_step_that_waits_for_the_device_or_takes_memory_is_seen():
    command = [sys.executable, "-c", WAITS, ROOT, HARNESS, *LINES]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


# ---- the reader ----

PTX = """
    // fma.rn.ftz.f32 in a comment, ex2.approx too
    @%p1 fma.rn.f32  %f1, %f2, %f3, %f4;
    mad.lo.s32  %r1, %r2, %r3, %r4;
    fma.rn.f32x2  %rd1, %rd2, %rd3, %rd4;
    div.rn.f32  %f1, %f2, %f3;
    div.s32  %r1, %r2, %r3;
    sqrt.rn.f32  %f1, %f2;
    cvt.rn.bf16.f32  %rs1, %f1;
    cvt.f32.bf16  %f1, %rs1;
    atom.global.gpu.acq_rel.add.u32  %r1, [%rd1], 1;
    redux.sync.max.s32  %r1, %r2, -1;
    @%p1 ld.global.L1::evict_first.L2::cache_hint.v4.b32  {%r1, %r2, %r3, %r4}, [%rd1], %rd2;
    ld.global.b16  %rs1, [%rd1];
"""


def test_what_is_allowed_passes():
    assert asm.ptx_forbidden(PTX) == []
    assert asm.ptx_multiply_adds(PTX) == 3
    assert asm.ptx_weight_loads(PTX) == {16: 1}
    assert asm.ptx_forbidden("    mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 {%r1}, {%r2};\n") == []


def test_a_bf16_sum_on_sm_80_is_no_multiply_add():
    ptx = "    mov.b16  %rs9, 0x3F80;\n    mov.b16  %rs8, 0x8000;\n    fma.rn.bf16  %rs1, %rs2, %rs9, %rs4;\n"
    assert asm.ptx_multiply_adds(ptx) == 0
    assert asm.ptx_multiply_adds(ptx + "    fma.rn.bf16  %rs1, %rs2, %rs3, %rs8;\n") == 0
    assert asm.ptx_multiply_adds(ptx + "    fma.rn.bf16  %rs1, %rs2, %rs3, %rs4;\n") == 1
    pair = "    mov.b32  %r9, -2147450880;\n    fma.rn.bf16x2  %r1, %r2, %r3, %r9;\n"
    assert asm.ptx_multiply_adds(pair) == 0
    assert asm.ptx_multiply_adds(pair + "    fma.rn.bf16x2  %r1, %r2, %r3, %r4;\n") == 2


DEPENDENT = """
    ld.param.b64  %rd1, [k_param_0];
    @%p1 ld.global.L1::evict_first.L2::cache_hint.v4.b32  {%r1, %r2, %r3, %r4}, [%rd1], %rd2;
    griddepcontrol.wait; // dummy
    griddepcontrol.launch_dependents; // dummy
    ld.global.v4.b32  {%r5, %r6, %r7, %r8}, [%rd3];
    st.global.b16  [%rd4], %rs1;
    ret;
"""
READ, WAIT, LET = "    ld.global.b32  %r9, [%rd5];\n", "    griddepcontrol.wait; // dummy\n", "launch_dependents"


def test_what_is_done_before_the_kernel_ahead_is_done():
    judge = asm.ptx_dependence
    assert judge(DEPENDENT, 0) == []
    assert judge(READ + DEPENDENT, 1) == [] and judge(READ + DEPENDENT, 0) and judge(READ * 2 + DEPENDENT, 1)
    for early in ("st.global.b16  [%rd4], %rs1;", "atom.global.gpu.acq_rel.add.u32  %r1, [%rd1], 1;",
                  "st.global.L1::no_allocate.b32 [%rd1], %r1;", "red.global.add.u32 [%rd1], 1;"):  # fmt: skip
        assert judge(f"    {early}\n" + DEPENDENT, 1)
    assert judge(DEPENDENT.replace(WAIT, ""), 0) and judge(DEPENDENT + WAIT, 0)
    assert judge(WAIT + DEPENDENT.replace(WAIT, ""), 0)  # no weight is asked for before it
    assert judge(DEPENDENT.replace(LET, "wait"), 0)
    let = f"    griddepcontrol.{LET}; // dummy\n"
    assert judge(let + DEPENDENT.replace(let, ""), 0)


SASS = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   ACQBULK ;
        /*0020*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0030*/                   EXIT ;
"""


BRANCHES = """
    @%p1 bra 	$L__BB0_2;
    @%p2 ld.global.L1::evict_first.v4.b32  {%r1, %r2, %r3, %r4}, [%rd1];
    griddepcontrol.wait; // dummy
    griddepcontrol.launch_dependents; // dummy
    ld.global.b32  %r5, [%rd3];
    bra.uni 	$L__BB0_3;
$L__BB0_2: // another kind
    @%p2 ld.global.L1::evict_first.v4.b32  {%r1, %r2, %r3, %r4}, [%rd2];
    ld.global.b32  %r6, [%rd2];
    griddepcontrol.wait; // dummy
    griddepcontrol.launch_dependents; // dummy
$L__BB0_3:
    st.global.b16  [%rd4], %rs1;
    ret;
"""


def test_each_way_through_a_kernel_waits_for_the_kernel_ahead():
    judge = asm.ptx_dependence
    assert judge(BRANCHES, 1) == [] and asm.ptx_asked_before_wait(BRANCHES) == 3
    assert judge(BRANCHES, 0)  # a scale that is asked for on one way
    assert judge(BRANCHES.replace(f"{WAIT}    griddepcontrol.{LET}; // dummy\n$", "$"), 1)  # one way without a wait
    assert judge(BRANCHES.replace("    griddepcontrol.wait", "    @%p3 griddepcontrol.wait", 1), 1)
    assert judge(BRANCHES.replace("ld.global.L1::evict_first", "ld.global", 1), 1)
    assert judge("    @%p3 bra 	$L__BB0_3;\n" + BRANCHES, 1)


def test_a_kernel_without_weights_waits_before_anything_else():
    no_weight = "\n".join(line for line in DEPENDENT.splitlines() if "evict_first" not in line)
    assert asm.ptx_dependence(no_weight, 0, weights=False) == [] != asm.ptx_dependence(no_weight, 0)
    assert asm.ptx_dependence(READ + no_weight, 0, weights=False)


@pytest.mark.parametrize(
    ("name", "kinds", "tiles", "rows", "asked"),
    [
        ("_head_kernel", dict(KIND=0), 2, 8, 8),
        ("_head_kernel", dict(KIND="q6_k"), 2, 8, 2 * 2 * 2 + 3),
        ("_head_kernel", dict(KIND="q8_0"), 2, 16, 2 + 6),
        ("_linear_residual_kernel", dict(KIND="int8"), 1, 1, 0),
        ("_gate_up_act_kernel", dict(GATE_KIND="q4_k", UP_KIND="q4_k"), 2, 1, 4),
        ("_gate_up_act_kernel", dict(GATE_KIND="q4_k", UP_KIND="q6_k"), 2, 1, 2),
        ("_qkv_rope_append_kernel", dict(Q_KIND="q4_k", K_KIND="q4_k", V_KIND="q6_k"), 2, 1, 4 + 4 + 8),
        ("_round_rows_kernel", {}, 0, 0, 0),
    ],
)  # fmt: skip
def test_what_is_asked_for_besides_weights(name, kinds, tiles, rows, asked):
    code_of = {kind.name: kind.code for kind in (*KINDS, *BY_SEGMENT)}
    codes = {argument: code_of[kind] if kind else 0 for argument, kind in kinds.items()}
    assert gpu_static.asked_besides(name, codes | dict(TILES=tiles, ROWS=rows)) == asked


def test_what_ptxas_left_before_the_wait():
    assert asm.sass_asked_before_wait(SASS) == 1
    assert asm.sass_asked_before_wait(SASS.replace("ACQBULK", "NOP")) is None
    assert asm.sass_asked_before_wait("        /*0000*/ @P0 BRA `(.L_x_0) ;\n" + SASS + ".L_x_0:\n") is None
    assert gpu_static.dependence_problems(DEPENDENT, SASS, 0) == []
    assert gpu_static.dependence_problems(DEPENDENT, SASS.replace("LDG.E.128", "LDC"), 0)
    assert gpu_static.dependence_problems(DEPENDENT, SASS.replace("ACQBULK", "LDG.E R8, desc[UR4][R2.64]", 1) + SASS, 0)


@pytest.mark.parametrize(
    "line",
    [
        "ex2.approx.f32", "ex2.approx.ftz.f32", "rcp.approx.f32", "rsqrt.approx.f32", "add.ftz.f32", "div.full.f32",
        "div.approx.f32", "rcp.rn.f32", "sqrt.approx.f32", "tanh.approx.f32", "atom.global.gpu.relaxed.add.f32",
        "red.global.add.f32", "atom.global.add.noftz.f16x2", "red.shared.add.noftz.bf16x2", "cvt.rz.bf16.f32",
        "cvt.rz.bf16x2.f32", "div.rz.f32", "tcgen05.mma.cta_group::1.kind::tf32",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16",
    ],
)  # fmt: skip
def test_forbidden_instructions_are_seen(line):
    assert asm.ptx_forbidden(f"{PTX}    @!%p2 {line}  %f1, %f2;\n")


def test_multiply_adds_in_the_wrong_place_are_seen():
    judge = gpu_static.arithmetic_problems
    assert not judge("_attend_kernel", "bf16", 12, 24, 24, 0)
    assert judge("_attend_kernel", "fp32", 12, 24, 24, 0)  # the contract rounds the product
    assert judge("_join_rows_kernel", "bf16", 1, 1, 1, 0)
    assert judge("_join_rows_kernel", "bf16", 0, 0, 1, 0)  # contracted when the assembly was made
    assert judge("_join_rows_kernel", "bf16", 0, 1, 1, 0)  # contracted in LLVM's IR
    assert judge("_attend_kernel", "bf16", 12, 24, 25, 0)
    assert judge("_attend_kernel", "bf16", 12, 24, 24, 1)


def test_llvm_ir_is_read():
    ir = """
  %1 = tail call float @llvm.fma.f32(float %a, float %b, float %c), !dbg !5
  %2 = call <2 x float> @llvm.fma.v2f32(<2 x float> %a, <2 x float> %b, <2 x float> %c)
  %3 = fadd float %1, %1
  %4 = fmul nnan ninf float %1, %1
"""
    assert asm.llvm_multiply_adds(ir) == 3
    assert asm.llvm_may_contract(ir) == 0
    assert asm.llvm_may_contract(ir + "  %5 = fmul contract float %1, %1\n  %6 = fadd nnan fast float %1, %1\n") == 2


def test_spills_and_limits_are_seen():
    said = asm.parse_resources(" Function k:\n  REG:168 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:672\n")
    limits = gpu_static.LIMITS["sm_90"]
    assert gpu_static.resource_problems(limits, said["reg"], said["stack"] + said["local"], 1024, 3)
    assert not gpu_static.resource_problems(limits, 168, 0, 1024, 3)
    assert gpu_static.resource_problems(limits, 256, 0, 0, 1)
    assert gpu_static.resource_problems(limits, 32, 0, 228 << 10, 1)
    assert gpu_static.resource_problems(limits, 255, 0, 0, 0)
    with pytest.raises(ValueError, match="cannot read what cuobjdump says"):
        asm.parse_resources("Function k: nothing")


@pytest.mark.parametrize(("threads", "registers", "shared", "resident"),
                         [(128, 168, 0, 3), (256, 255, 0, 1), (32, 16, 0, 32), (128, 32, 100 << 10, 2)])  # fmt: skip
def test_resident_programs(threads, registers, shared, resident):
    assert gpu_static.resident_programs(gpu_static.LIMITS["sm_90"], threads, registers, shared) == resident


LAYOUT = """#blocked = #ttg.blocked<{{sizePerThread = [1, {each}], threadsPerWarp = [{lanes}], warpsPerCTA = [{warps}], order = [1, 0]}}>
    %w = {load} : {pointer}tensor<8x128x{element}, #blocked> loc(#loc)
    %x = tt.load %q : tensor<8x1x8x!tt.ptr<f32>, #blocked> loc(#loc)
    %h = tt.load %q, %n, %z cacheModifier = cg : tensor<8x256x!tt.ptr<bf16>, #blocked1> loc(#loc)
"""  # noqa: E501
LOADS = {  # as Triton writes them for NVIDIA, and its versions for AMD
    "nvidia": ("tt.load %p, %m evictionPolicy = evict_first", "", "!tt.ptr<{}>"),
    "amd": ("amdg.buffer_load %p[%o], %m {contiguity = 8 : i32}", "", "{}"),
    "amd of 3.9": (
        "amdg.buffer_load %p[%o], %m {cachePolicy = #tt.cache_policy<cache_modifier = none, eviction_policy = "
        "evict_first>, contiguity = 8 : i32}",
        "!tt.ptr<{}> -> ",
        "{}",
    ),
}


@pytest.mark.parametrize("version", LOADS)
@pytest.mark.parametrize(
    ("each", "lanes", "warps", "dtype", "expected"),
    [
        (8, "2, 16", "4, 1", "bf16", (16, 16, 1.0, True)),
        (8, "2, 16", "4, 1", "f32", (16, 32, 1.0, True)),
        (8, "8, 4", "1, 4", "bf16", (16, 16, 1.0, False)),
        (4, "1, 32", "4, 1", "bf16", (8, 16, 1.0, True)),
        (2, "2, 16", "4, 1", "bf16", (4, 16, 1.0, False)),
        (1, "32, 1", "1, 4", "bf16", (2, 64, 0.0625, False)),
    ],
)
def test_a_warps_weight_load(version, each, lanes, warps, dtype, expected):
    load, pointer, element = (text.replace("{}", dtype) for text in LOADS[version])
    text = LAYOUT.format(each=each, lanes=lanes, warps=warps, load=load, pointer=pointer, element=element)
    load = asm.weight_layout(text)
    assert (load.bytes_at_once, load.bytes_of_thread, load.sector_use, load.columns_first) == expected
    problems = gpu_static.load_problems({load.bytes_at_once: 1}, load.sector_use, load.columns_first)
    assert bool(problems) == (expected[0] != 16 or not expected[3])


def test_a_warps_load_of_two_segments():
    load, pointer, element = (text.replace("{}", "bf16") for text in LOADS["nvidia"])
    text = LAYOUT.format(each=8, lanes="1, 32", warps="2, 2", load=load, pointer=pointer, element=element)
    found = asm.weight_layout(text.replace("tensor<8x128x", "tensor<2x512x"))
    assert (found.bytes_at_once, found.bytes_of_thread, found.sector_use, found.columns_first) == (16, 16, 1.0, True)


AMD = """
	.amdhsa_float_denorm_mode_32 3
	v_div_scale_f32 v1, vcc, v2, v3, v2
	v_rcp_f32_e32 v4, v1
	v_fma_f32 v5, -v1, v4, 1.0
	v_fmac_f32_e32 v4, v5, v4
	v_fma_f32 v6, -v1, v7, v8
	v_fmac_f32_e32 v7, v6, v4
	v_fma_f32 v6, -v1, v7, v8
	v_div_fmas_f32 v1, v6, v4, v7
	v_div_fixup_f32 v1, v1, v3, v2
	global_atomic_add v1, v2, v3, s[0:1] sc0
	v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7]
"""


def test_amd_assembly_is_read():
    """A division's own multiply-adds are none of the kernel's."""
    assert asm.amd_forbidden(AMD) == []
    assert asm.amd_multiply_adds(AMD) == 2
    assert asm.amd_multiply_adds(AMD + "\tv_fma_f32 v1, v2, v3, v4\n") == 3
    for line in ("v_rcp_f32_e32 v1, v2", "v_exp_f32_e32 v1, v2", "global_atomic_add_f32 v1, v2, s[0:1]",
                 "global_atomic_pk_add_bf16 v1, v2, s[0:1]", "ds_add_rtn_f32 v1, v2, v3"):  # fmt: skip
        assert asm.amd_forbidden(f"{AMD}\t{line}\n"), line
    assert asm.amd_forbidden(AMD.replace("mode_32 3", "mode_32 0"))


@pytest.mark.parametrize("reciprocal", ["v_rcp_iflag_f32_e32", "v_rcp_f32_e32"])
def test_a_division_of_integers_has_a_reciprocal(reciprocal):
    """Of 32 bits, as Triton's versions have it; each is known by its literal."""
    division = f"\t{reciprocal} v1, v1\n\tv_mul_f32_e32 v1, 0x4f7ffffe, v1\n"
    assert asm.amd_forbidden(AMD + division) == []
    assert asm.amd_forbidden(AMD + division + f"\t{reciprocal} v1, v1\n")


ARRIVES = """
	buffer_store_short v2, v14, s[8:11], 0 offen
	s_waitcnt vmcnt(0)
	s_barrier
	buffer_wbl2 sc1
	s_waitcnt vmcnt(0)
	global_atomic_add v3, v3, v4, s[4:5] sc0
"""


def test_a_program_that_is_counted_before_its_stores_are_there_is_seen():
    assert asm.amd_stores_on_their_way(ARRIVES) == []
    assert asm.amd_stores_on_their_way(ARRIVES.replace("\ts_waitcnt vmcnt(0)\n", "", 1))
    assert asm.amd_stores_on_their_way(ARRIVES.replace("vmcnt(0)\n\ts_b", "lgkmcnt(0)\n\ts_b"))


def test_a_step_beside_the_paper():
    assert gpu_static.count_problems(moved=100, paper=101, in_layers=96, layers=16, besides=4) == []
    assert gpu_static.count_problems(moved=100, paper=103, in_layers=96, layers=16, besides=4)
    assert gpu_static.count_problems(moved=100, paper=100, in_layers=97, layers=16, besides=4)
    assert gpu_static.count_problems(moved=100, paper=100, in_layers=96, layers=16, besides=5)


@pytest.mark.parametrize("kind", (*KINDS, *BY_SEGMENT), ids=lambda kind: kind.name)
def test_quantised_weights_on_paper_are_as_large_as_packed(kind):
    packed = prod(kind.packed_shape(48, 2048)) * kind.dtype.itemsize
    assert packed == gpu_static.packed_bytes(48, 2048, kind.name)


TILE_LOOP = """
$L__BB0_5:
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
$L__tmp7:
    fma.rn.f32 %r10, %r1, %r2, %r40;
    fma.rn.f32 %r11, %r1, %r3, %r41;
    fma.rn.f32 %r40, %r4, %r2, %r10;
    fma.rn.f32 %r41, %r4, %r3, %r11;
    @%p2 bra $L__BB0_5;
    add.rn.f32 %r50, %r40, %r41;
"""


def test_a_tiles_sums_are_chains():
    found = asm.ptx_tile_loop(TILE_LOOP)
    assert (found.chains, found.widths, found.problems) == ([2, 2], {16: 1}, [])
    assert not gpu_static.tile_problems(asm.TileLoop([16] * 8, Counter({16: 3}), []), 8, {"FFMA": 80, "LDS": 20})
    assert gpu_static.tile_problems(found, 2, {"FFMA": 80, "LDS": 20})  # of two k, not of sixteen
    assert gpu_static.tile_problems(asm.TileLoop([16] * 8, Counter({16: 3}), []), 16, {"FFMA": 80, "LDS": 20})
    assert gpu_static.tile_problems(asm.TileLoop([16] * 8, Counter({4: 3}), []), 8, {"FFMA": 80, "LDS": 20})
    assert gpu_static.tile_problems(asm.TileLoop([16] * 8, Counter({16: 3}), []), 8, {"FFMA": 60, "LDS": 40})


PAIRS = """
$L__BB0_5:
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    mov.b64 %rd9, {%r2, %r3};
    mov.b64 %rd2, {%r40, %r41};
    fma.rn.f32x2 %rd3, %rd8, %rd9, %rd2;
    mov.b64 {%r10, %r11}, %rd3;
    mov.b64 %rd4, {%r11, %r10};
    fma.rn.f32x2 %rd5, %rd7, %rd9, %rd4;
    mov.b64 {%r41, %r40}, %rd5;
    @%p2 bra $L__BB0_5;
"""


def test_chains_of_numbers_that_are_paired_anew():
    found = asm.ptx_tile_loop(PAIRS)
    assert (found.chains, found.problems) == ([2, 2], [])
    assert asm.ptx_tile_loop(PAIRS.replace("{%r11, %r10}", "{%r11, %r11}")).problems  # one of them is used twice
    assert asm.ptx_tile_loop(PAIRS.replace("%rd7, %rd9, %rd4", "%rd3, %rd9, %rd4")).problems  # both are multiplied


@pytest.mark.parametrize(
    ("line", "other"),
    [
        ("fma.rn.f32 %r41, %r4, %r3, %r11;", "fma.rn.f32 %r41, %r4, %r3, %r10;"),
        ("fma.rn.f32 %r41, %r4, %r3, %r11;", "fma.rn.f32 %r41, %r4, %r10, %r11;"),
        ("fma.rn.f32 %r41, %r4, %r3, %r11;", "mul.rn.f32 %r42, %r4, %r3;\n    add.rn.f32 %r41, %r42, %r11;"),
    ],
)
def test_sums_that_are_no_chains_are_seen(line, other):
    assert asm.ptx_tile_loop(TILE_LOOP.replace(line, other)).problems
