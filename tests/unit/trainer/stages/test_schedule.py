"""The order of a pipeline's micro-batches: each once, forward before backward, no more held than promised, 1F1B."""

import pytest

from trainer.stages.schedule import Compute, Transfer, in_flight, one_forward_one_backward

SIZES = [(stages, micros) for stages in range(1, 9) for micros in range(1, 13)]


def computed(stages: int, stage: int, micros: int) -> list[str]:
    """F0 F1 B0 ...: what a stage computes."""
    steps = one_forward_one_backward(stages, stage, micros)
    return [f"{step.kind[0].upper()}{step.micro}" for step in steps if isinstance(step, Compute)]


def transfers(stages: int, stage: int, micros: int) -> list[Transfer]:
    steps = one_forward_one_backward(stages, stage, micros)
    return [part for step in steps if not isinstance(step, Compute) for part in step]


@pytest.mark.parametrize(
    ("stages", "stage", "micros", "order"),
    [
        (1, 0, 3, "F0 B0 F1 B1 F2 B2"),
        (3, 0, 5, "F0 F1 F2 B0 F3 B1 F4 B2 B3 B4"),
        (3, 1, 5, "F0 F1 B0 F2 B1 F3 B2 F4 B3 B4"),
        (3, 2, 5, "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4"),
        (4, 0, 2, "F0 F1 B0 B1"),  # fewer micro-batches than stages
        (4, 2, 2, "F0 F1 B0 B1"),
        (4, 3, 2, "F0 B0 F1 B1"),
    ],
)
def test_one_forward_one_backward(stages: int, stage: int, micros: int, order: str) -> None:
    assert computed(stages, stage, micros) == order.split()


@pytest.mark.parametrize(("stages", "micros"), SIZES)
def test_every_micro_batch_goes_forward_then_backward_once_and_in_order(stages: int, micros: int) -> None:
    for stage in range(stages):
        done = computed(stages, stage, micros)
        assert [word for word in done if word[0] == "F"] == [f"F{micro}" for micro in range(micros)]
        assert [word for word in done if word[0] == "B"] == [f"B{micro}" for micro in range(micros)]
        assert all(done.index(f"F{micro}") < done.index(f"B{micro}") for micro in range(micros))


@pytest.mark.parametrize(("stages", "micros"), SIZES)
def test_a_stage_holds_what_it_says(stages: int, micros: int) -> None:
    for stage in range(stages):
        held = most = 0
        for word in computed(stages, stage, micros):
            held += 1 if word[0] == "F" else -1
            most = max(most, held)
        assert most == in_flight(stages, stage, micros) <= stages - stage


@pytest.mark.parametrize(("stages", "micros"), SIZES)
def test_what_is_computed_was_received_and_what_is_sent_was_computed(stages: int, micros: int) -> None:
    for stage in range(stages):
        have = {("forward", micro) for micro in range(micros)} if stage == 0 else set()
        if stage == stages - 1:  # its backward pass begins at its own loss
            have |= {("backward", micro) for micro in range(micros)}
        done: set[tuple[str, int]] = set()
        for step in one_forward_one_backward(stages, stage, micros):
            if isinstance(step, Compute):
                assert (step.kind, step.micro) in have
                done.add((step.kind, step.micro))
                continue
            assert step, "an exchange of nothing"
            for part in step:
                wanted = ("forward" if part.what == "activation" else "backward", part.micro)
                if part.kind == "send":
                    assert wanted in done
                else:
                    have.add(wanted)


@pytest.mark.parametrize(("stages", "micros"), SIZES)
def test_every_boundary_is_crossed_once_each_way_by_every_micro_batch(stages: int, micros: int) -> None:
    for stage in range(stages):
        found = sorted((part.kind, part.what, part.peer, part.micro) for part in transfers(stages, stage, micros))
        wanted = []
        for micro in range(micros):
            if stage > 0:
                wanted += [("receive", "activation", stage - 1, micro), ("send", "gradient", stage - 1, micro)]
            if stage < stages - 1:
                wanted += [("send", "activation", stage + 1, micro), ("receive", "gradient", stage + 1, micro)]
        assert found == sorted(wanted)
