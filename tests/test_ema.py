"""Does the teacher follow the student, in its parameters and in nothing else?"""

import pytest
import torch
from torch import nn

from audiossl.ema import update_teacher


def network(seed: int, predictor: bool = False) -> nn.ModuleDict:
    torch.manual_seed(seed)
    parts = {"encoder": nn.Linear(4, 3), "projector": nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))}
    network = nn.ModuleDict(parts | ({"predictor": nn.Linear(5, 5)} if predictor else {}))
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    network["projector"][1].running_mean.normal_()
    return network


def test_parameters_move_buffers_and_the_student_stay():
    teacher, student = network(0), network(1, predictor=True)
    before, source = ({name: value.clone() for name, value in part.state_dict().items()} for part in (teacher, student))
    update_teacher(teacher, student, 0.9)
    moved = {name for name, _ in teacher.named_parameters()}
    for name, value in teacher.state_dict().items():
        expected = 0.9 * before[name] + 0.1 * source[name] if name in moved else before[name]
        torch.testing.assert_close(value, expected)
    assert all(torch.equal(value, source[name]) for name, value in student.state_dict().items())


def test_momentum_one_leaves_the_teacher_bit_for_bit_and_zero_copies_the_student():
    teacher, student = network(0), network(1)
    before = [p.clone() for p in teacher.parameters()]
    update_teacher(teacher, student, 1.0)
    assert all(map(torch.equal, teacher.parameters(), before))
    update_teacher(teacher, student, 0.0)
    for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_it_works_on_parameters_with_and_without_gradients_and_records_nothing():
    teacher, student = network(0), network(1)
    teacher.requires_grad_(False)
    update_teacher(teacher, student, 0.5)
    assert all(p.grad_fn is None and p.is_leaf for p in [*teacher.parameters(), *student.parameters()])


def test_a_teacher_unlike_the_student_is_an_error():
    with pytest.raises(AssertionError, match="the student has no parameter predictor.weight"):
        update_teacher(network(0, predictor=True), network(1), 0.9)
