"""Merge or slots: what was measured decides."""

from workers.pipelines.costs import LEAST, LOOK_AGAIN, Costs

LANE = "lane"


def measured(slots: float, merged: float, swap: float = 0.0) -> Costs:
    """Seconds an image with slots (8 at once), merged (1 at once), and for a swap."""
    costs = Costs()
    for _ in range(LEAST + 1):
        costs.rendered(LANE, "slots", 8, 8 * slots)
        costs.rendered(LANE, "merged", 1, merged)
        costs.swapped(LANE, swap)
    return costs


def test_slots_until_both_are_known() -> None:
    costs = Costs()
    assert costs.choose(LANE, [4, 4]) == "slots"
    for _ in range(2):
        costs.rendered(LANE, "slots", 8, 8.0)
    assert costs.choose(LANE, [4, 4]) == "merged", "slots are known, merging is not"
    assert costs.apart(8) == frozenset()


def test_the_first_measurement_is_warm_up() -> None:
    costs = Costs()
    costs.rendered(LANE, "slots", 2, 100.0)
    costs.rendered(LANE, "merged", 1, 1.0)
    assert costs.choose(LANE, [1, 1]) == "slots"


def test_the_cheaper_way_counting_swaps() -> None:
    assert measured(slots=1.0, merged=1.5).choose(LANE, [1] * 8) == "slots"
    assert measured(slots=1.0, merged=0.9).choose(LANE, [1] * 8) == "merged"
    assert measured(slots=1.0, merged=0.9, swap=0.2).choose(LANE, [1] * 8) == "slots"


def test_noise_only_adds() -> None:
    costs = measured(slots=1.0, merged=1.5)
    costs.rendered(LANE, "slots", 8, 80.0)
    assert costs.choose(LANE, [1] * 8) == "slots"


def test_the_loser_is_measured_again_now_and_then() -> None:
    costs = measured(slots=1.0, merged=2.0)
    chosen = []
    for _ in range(2 * LOOK_AGAIN // 8):
        chosen.append(costs.choose(LANE, [1] * 8))
        if chosen[-1] == "slots":
            costs.rendered(LANE, "slots", 8, 8.0)
        for _ in range(8 if chosen[-1] == "merged" else 0):
            costs.rendered(LANE, "merged", 1, 2.0)
    assert chosen.count("merged") == 1
    assert chosen.index("merged") == LOOK_AGAIN // 8


def test_slots_are_measured_again_where_sets_come_one_at_a_time() -> None:
    """There no micro-batch has two sets, so nobody would ask which way is cheaper: such lanes come mixed again."""
    costs = measured(slots=2.0, merged=1.0)
    for _ in range(LOOK_AGAIN // 8):
        assert costs.apart(8) == {LANE}
        costs.rendered(LANE, "merged", 8, 8.0)
    assert costs.apart(8) == frozenset()
    assert costs.choose(LANE, [1] * 8) == "slots"
    costs.rendered(LANE, "slots", 8, 16.0)
    assert costs.apart(8) == {LANE}, "still dearer"
    for _ in range(LOOK_AGAIN // 8):
        costs.rendered(LANE, "merged", 8, 8.0)
    for _ in range(2):
        costs.rendered(LANE, "slots", 8, 4.0)
    assert costs.apart(8) == frozenset(), "cheaper now"


def test_lanes_to_be_claimed_one_set_at_a_time() -> None:
    costs = measured(slots=2.0, merged=1.0)
    assert costs.apart(8) == {LANE}
    assert measured(slots=1.0, merged=2.0).apart(8) == frozenset()
    few = Costs()
    for _ in range(2):
        few.rendered(LANE, "slots", 8, 16.0)
        few.rendered(LANE, "merged", 1, 1.0)
    assert few.apart(8) == frozenset(), "one measurement of slots is not enough to stop measuring them"


def test_sizes_are_told_apart() -> None:
    costs = measured(slots=1.0, merged=3.0)
    for _ in range(2):
        costs.rendered(LANE, "merged", 4, 2.0)
    assert costs.choose(LANE, [4, 4]) == "merged"
    assert costs.choose(LANE, [1] * 8) == "slots"
