"""Does ATST-Clip do what the published code does, and keep its promises where that has no numbers?"""

import pytest
import torch
from atsts import ATSTGolden, check_steps
from conftest import golden_cases

TRAINED = golden_cases("atst_clip_*train*")


@pytest.fixture(scope="module", params=TRAINED)
def golden(request):
    return ATSTGolden(request.param, "atst_clip")


def views_of(golden, step: int):
    views = [golden.input[f"step{step}.view{view}"] for view in (0, 1)]
    lengths = [golden.input[f"step{step}.len{view}"] // golden.model.encoder.patch[1] for view in (0, 1)]
    columns = golden.model.encoder.grid_for(views[0])[1]
    return views, [torch.arange(columns) < length[:, None] for length in lengths]


def test_the_first_steps_features_and_health_equal_the_published_ones(golden):
    model, (views, valid) = golden.model.train(), views_of(golden, 0)
    student = model.student.encoder(torch.cat(views), valid=torch.cat(valid))[:, 0]
    teacher = model.encoder(torch.cat(views), valid=torch.cat(valid))[:, 0]
    for name, ours in (("student_cls", student), ("teacher_cls", teacher)):
        torch.testing.assert_close(ours, golden.expected[f"step0.{name}"], rtol=0, atol=1e-5)
    output = model.loss(views, valid)
    assert abs(output["loss"] - golden.expected["step0.loss"]) <= golden.bound("loss")
    for name, theirs in (("student_std", "std_cls_s"), ("teacher_std", "std_cls_t")):
        assert abs(output[name] - golden.case["per_step"][0][theirs]) < 1e-6


@pytest.mark.parametrize("case", TRAINED)
def test_optimiser_steps_end_where_the_published_ones_do(case):
    golden = ATSTGolden(case, "atst_clip")
    check_steps(golden, lambda step: golden.model.loss(*views_of(golden, step)))
