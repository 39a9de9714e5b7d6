"""Does ATST-Frame do what the published code does?"""

import pytest
import torch
from atsts import ATSTGolden, check_steps, large_cases
from conftest import golden_cases

TRAINED = golden_cases("atst_frame_train*") + large_cases("atst_frame_asym*")


@pytest.fixture(params=TRAINED)
def golden(request):
    golden = ATSTGolden(request.param, "atst_frame")
    golden.model.symmetric = golden.config["symmetric"]
    return golden


def inputs_of(golden, step: int):
    views = [golden.input[f"step{step}.view{view}"] for view in (0, 1)]
    columns = golden.model.encoder.grid_for(views[0])[1]
    lengths = golden.input["step0.lengths" if f"step{step}.lengths" not in golden.input else f"step{step}.lengths"]
    valid = torch.arange(columns) < (lengths // golden.model.encoder.patch[1])[:, None]
    return views, golden.input[f"step{step}.mask"].bool(), valid


def test_features_at_hidden_frames_equal_the_published_ones(golden):
    views, mask, valid = inputs_of(golden, 0)
    model = golden.model.eval()
    shown = mask & valid
    hidden = model.encode_masked(model.student.encoder, views[0], mask, valid)[shown]
    torch.testing.assert_close(hidden, golden.expected["eval.student_masked_frames"], rtol=0, atol=1e-5)
    seen = model.encoder(views[0], valid=valid)[shown]
    torch.testing.assert_close(seen, golden.expected["eval.teacher_frames_at_mask"], rtol=0, atol=1e-5)


def test_the_first_steps_loss_and_health_equal_the_published_ones(golden):
    output = golden.model.train().loss(*inputs_of(golden, 0))
    assert abs(output["loss"] - golden.expected["step0.loss"]) <= golden.bound("loss")
    for name, theirs in (("student_std", "std_frm_stu"), ("teacher_std", "std_frm_tea")):
        assert abs(output[name] - golden.case["per_step"][0][theirs]) < 1e-6


def test_optimiser_steps_end_where_the_published_ones_do(golden):
    check_steps(golden, lambda step: golden.model.loss(*inputs_of(golden, step)))
