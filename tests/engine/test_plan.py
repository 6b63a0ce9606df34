"""The memory plan: within its budget, more with more memory, all where it fits, and words where nothing helps."""

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from lightx2v.models.wan.config import WanConfig
from lightx2v.models.wan.transformer import WanTransformer
from lightx2v.offload.parts import filed_blocks, spread
from lightx2v.offload.placing import container_bytes
from lightx2v.offload.plan import (
    GB,
    RESERVE,
    DoesNotFitError,
    Machine,
    Needs,
    Plan,
    Sizes,
    has_room,
    measure,
    plan,
    tighter,
)
from lightx2v_kernels import select

CPU = torch.device("cpu")
WAN_14B = Sizes((700_000_000,) * 40, 450_000_000)
ONE = Needs((WAN_14B,), 3_000_000_000)
TWO = Needs((WAN_14B, WAN_14B), 3_000_000_000)
UNEVEN = Needs(
    (Sizes(tuple(37 * i % 11 + 5 for i in range(12)), 11), Sizes(tuple(29 * i % 13 + 3 for i in range(9)), 70)), 100
)
MACHINE = Machine(24_000_000_000, 64_000_000_000, 57_000_000_000)


def with_vram(free: int) -> Machine:
    return replace(MACHINE, free_vram=free)


def planned_or_none(needs: Needs, free: int, **options) -> Plan | None:
    try:
        return plan(needs, with_vram(free), **options)
    except DoesNotFitError:
        return None


@pytest.mark.parametrize("needs", [ONE, TWO, replace(ONE, vae=500_000_000), replace(TWO, activations=9_000_000_000)])
@pytest.mark.parametrize("options", [{}, {"least": True}, {"budget_gb": 20}, {"vae_offload": True}])
def test_more_memory_never_makes_it_worse_and_the_budget_holds(needs: Needs, options: dict) -> None:
    plans = [planned_or_none(needs, int(free * GB), **options) for free in range(1, 90)]
    found = [each for each in plans if each is not None]
    assert plans[0] is None and found == plans[plans.index(found[0]) :], "once it fits it fits with more"
    for less, more in pairwise(found):
        assert more.resident >= less.resident and more.streamed <= less.streamed and more.passing <= less.passing
        assert more.together >= less.together
        assert more.prefetch >= less.prefetch or not more.streamed
    for each in found:
        assert each.peak <= each.budget
        assert each.resident + each.streamed == 40
        assert not options.get("least") or each.resident == 0
        assert each.budget <= options.get("budget_gb", 90) * GB


def test_every_byte_counts() -> None:
    """Over all budgets of an uneven pair the number of blocks that stay only grows, and each budget is kept."""
    plans = [planned_or_none(UNEVEN, RESERVE + free) for free in range(100, 600)]
    found = [each for each in plans if each is not None]
    assert len({each.resident for each in found}) > 6 and found[0].resident == 0 and found[-1].together
    assert all(more.resident >= less.resident for less, more in pairwise(found))
    assert all(each.peak <= each.budget for each in found)


@pytest.mark.parametrize("needs", [ONE, TWO, UNEVEN])
def test_the_least_is_exact_and_said(needs: Needs) -> None:
    with pytest.raises(DoesNotFitError, match="GPU memory are needed at least"):
        plan(needs, with_vram(1))
    low, high = 1, 10**11
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if planned_or_none(needs, middle) else (middle, high)
    least = plan(needs, with_vram(high))
    assert (least.resident, least.prefetch) == (0, 0) and least.peak == high
    block = max(size for sizes in needs.transformers for size in sizes.blocks)
    rest = max(sizes.rest for sizes in needs.transformers)
    assert high == block + rest + needs.activations + RESERVE


def test_what_is_needed_is_named() -> None:
    with pytest.raises(DoesNotFitError) as raised:
        plan(ONE, with_vram(4_000_000_000))
    assert str(raised.value).startswith("4.8 GB of GPU memory are needed at least (1.1 for one block and what is no ")
    assert "3.0 to compute this size), 4.0 GB may be used: make the video smaller or shorter" in str(raised.value)
    with pytest.raises(ValueError, match="vram_budget_gb=-2"):
        plan(ONE, MACHINE, budget_gb=-2)


def test_everything_stays_where_it_fits() -> None:
    exact = WAN_14B.total + ONE.activations + RESERVE
    whole = plan(ONE, with_vram(exact))
    assert whole.whole and whole.streamed == whole.passing == whole.ram == 0 and whole.peak == exact
    assert whole.line() == "memory: all 40 blocks on the GPU; 32.0 of 32.0 GB"
    one_less = plan(ONE, with_vram(exact - 1))
    # of two that move, the two pieces that they share would be as large as they are
    assert not one_less.whole and one_less.resident == 37 and one_less.streamed == 3


def test_experts_take_turns_or_stay_together() -> None:
    both = 2 * WAN_14B.total + TWO.activations + RESERVE
    assert plan(TWO, with_vram(both)).whole
    turns = plan(TWO, with_vram(both - 1))
    assert not turns.whole and not turns.together and turns.streamed == 0 and turns.ram == 2 * WAN_14B.total
    assert "all 40 blocks on the GPU" in turns.line() and "both" not in turns.line()
    assert "both experts" in plan(TWO, with_vram(both)).line()


def test_the_line_says_what_passes() -> None:
    made = plan(ONE, replace(MACHINE, free_vram=16_000_000_000, link=25e9))
    assert (made.resident, made.streamed, made.prefetch) == (15, 25, 1)
    assert made.line() == (
        "memory: 15 of 40 blocks stay on the GPU, 25 pass through it (17.50 GB a pass, 0.70 s of copying); "
        "15.9 of 16.0 GB; 28.4 GB in RAM, 28.4 of it pinned"
    )
    short = plan(ONE, replace(MACHINE, free_vram=16_000_000_000, free_ram=16_000_000_000, pin_limit=10_000_000_000))
    assert short.line().endswith(
        "13.8 GB in RAM, 10.0 of it pinned; 23 blocks are read from the file as they are needed (16.1 GB)"
    )
    none = plan(ONE, replace(MACHINE, free_vram=16_000_000_000, free_ram=1_000_000_000))
    assert "40 blocks are read" in none.line() and none.line().endswith(
        "only 1.0 GB of RAM are free: the system may swap to disk"
    )
    assert "(17.50 GB a pass)" in short.line()


PAIR = replace(ONE, waiting=1_000_000_000)


def moved(made: Plan) -> float:
    """Bytes that a step of two passes copies."""
    return made.passing * (1 if made.paired else 2)


def test_two_passes_share_a_copy_where_a_step_then_moves_less() -> None:
    """A second pass that waits takes the room of a block and a half: fewer stay, and still fewer bytes move."""
    tables = {
        # GB of the card: blocks that stay with passes one after the other, with shared copies (None: not shared)
        6: (0, None),
        8: (3, 2),
        12: (9, 7),
        16: (15, 13),
        24: (26, 25),
        30: (35, 33),
        31.9: (37, 36),
        32.2: (40, None),
    }
    for card, (without, shared) in tables.items():
        old, made = plan(ONE, with_vram(int(card * GB))), plan(PAIR, with_vram(int(card * GB)))
        assert (old.resident, made.resident if made.paired else None) == (without, shared), card
        assert made.paired or replace(made, paired=old.paired) == old
    assert planned_or_none(PAIR, int(4.9 * GB)) == planned_or_none(ONE, int(4.9 * GB)), "no room for a second pass"


@pytest.mark.parametrize("needs", [PAIR, replace(TWO, waiting=400_000_000), replace(PAIR, waiting=9_000_000_000)])
def test_shared_copies_never_move_more_and_keep_the_budget(needs: Needs) -> None:
    shared = 0
    for free in range(50, 400):
        old = planned_or_none(replace(needs, waiting=0), int(free * GB / 10))
        made = planned_or_none(needs, int(free * GB / 10))
        assert (made is None) == (old is None)
        if old is None or made is None:
            continue
        assert made.peak <= made.budget and made.prefetch >= old.prefetch
        assert moved(made) < moved(old) if made.paired else made == old
        shared += made.paired
    assert shared > 60


def test_shared_copies_where_blocks_are_in_their_file() -> None:
    """The least takes the room for a second pass only there; and no more is read from the file for it."""
    little, much = replace(MACHINE, free_vram=16 * 10**9, free_ram=10 * 10**9), with_vram(16 * 10**9)
    assert plan(PAIR, little, least=True).paired and plan(PAIR, little, least=True).resident == 0
    assert not plan(PAIR, much, least=True).paired and plan(PAIR, much, least=True) == plan(ONE, much, least=True)
    assert plan(PAIR, little).paired
    once = replace(much, free_ram=int(22 * GB))  # as many blocks in the file as stay: each is read once a video
    assert plan(ONE, once).filed == 15 == plan(ONE, once).resident and not plan(PAIR, once).paired
    assert plan(PAIR, replace(once, free_ram=int(12 * GB))).paired


def test_the_line_says_what_passes_share() -> None:
    made = plan(PAIR, replace(MACHINE, free_vram=16_000_000_000, link=25e9))
    assert made.line().startswith(
        "memory: 13 of 40 blocks stay on the GPU, 27 pass through it, once for both passes of guidance (18.90 GB a "
        "step, 0.76 s of copying); 15.6 of 16.0 GB; "
    )


def test_a_second_try_lets_no_pass_wait() -> None:
    failed = plan(PAIR, with_vram(int(16 * GB)))
    again = tighter(PAIR, MACHINE, failed)
    assert failed.paired and not again.paired and again.peak < failed.peak


def test_a_container_has_its_own_limit(tmp_path: Path) -> None:
    assert container_bytes(tmp_path) == (sys.maxsize, 0), "no control group of version 2"
    (tmp_path / "memory.current").write_text("9000\n")
    (tmp_path / "memory.stat").write_text("anon 5000\nactive_file 1500\ninactive_file 1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert container_bytes(tmp_path) == (sys.maxsize, 0)
    (tmp_path / "memory.max").write_text("16000\n")
    assert container_bytes(tmp_path) == (16000, 6500), "what files are cached can be dropped"
    (tmp_path / "memory.stat").write_text("inactive_file 99999\n")
    assert container_bytes(tmp_path) == (16000, 0)


def test_encoders_and_vae() -> None:
    needs = replace(
        ONE, text_encoder=(11_400_000_000, 9_000_000_000), image_encoder=(2_400_000_000, 0), vae=500_000_000
    )
    made = plan(needs, with_vram(8_000_000_000))
    assert (made.text_encoder, made.image_encoder) == ("cpu", "visits") and "text encoder on the CPU" in made.line()
    assert plan(needs, MACHINE).text_encoder == "visits"
    twelve = plan(needs, with_vram(11_500_000_000))
    assert twelve.text_encoder == "streams" and "text encoder block by block" in twelve.line()
    assert "it decodes in tiles of 320 pixels" in replace(made, tile=320).line() and "tiles" not in made.line()
    large = with_vram(100_000_000_000)
    room = made.beside_weights, plan(needs, large).beside_weights
    assert room == (made.budget - RESERVE, large.free_vram - RESERVE - WAN_14B.total)
    assert plan(ONE, MACHINE).text_encoder == "" and plan(ONE, MACHINE).vae == "stays"
    whole = with_vram(WAN_14B.total + ONE.activations + RESERVE + needs.vae)
    assert plan(needs, whole).vae == "stays" and plan(needs, whole, vae_offload=True).vae == "visits"
    assert plan(needs, replace(whole, free_vram=whole.free_vram - 1)).vae == "visits"
    assert has_room(1, RESERVE + 1) and not has_room(2, RESERVE + 1) and not has_room(int(2 * GB), 10**11, 2.5)


def test_a_network_is_measured_before_its_weights_are_read() -> None:
    config = WanConfig(256, 512, 3, 16, 16, 32, 64, (1, 2, 2))
    kernels = select(device=CPU, dtype=torch.float32, head_dim=128)
    sizes = measure(WanTransformer(config, kernels))
    with torch.device("meta"):
        assert measure(WanTransformer(config, kernels)) == sizes
        half = measure(WanTransformer(config, kernels).half())
    assert len(sizes.blocks) == 3 and len(set(sizes.blocks)) == 1 and sizes.rest > 0
    numbers = 8 * 256 * 256 + 2 * 256 * 512  # of a block's matrices
    assert 4 * numbers < sizes.blocks[0] < 1.1 * 4 * numbers
    assert sizes.total == pytest.approx(2 * half.total, rel=0.01)


def test_what_stays_on_the_device_is_what_need_not_be_in_ram() -> None:
    for count, resident in ((40, 25), (40, 0), (40, 40), (7, 3)):
        moving = set(spread(count, count - resident))
        for filed in range(count + 1):
            chosen = filed_blocks(count, filed, resident)
            assert len(set(chosen)) == filed and list(chosen) == sorted(chosen)
            assert len(moving & set(chosen)) == max(0, filed - resident)
    assert filed_blocks(8, 4, 0) == spread(8, 4)
