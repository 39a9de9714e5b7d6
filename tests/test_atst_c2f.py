"""Does distillation from Clip to Frame do what the published code does?"""

import pytest
import torch
from atsts import large_cases, settings_of
from goldens import Golden

from audiossl.config.settings import instantiate
from audiossl.errors import UserError
from audiossl.methods.atst_c2f import features_of
from audiossl.running.build import method_from_config
from audiossl.weights.atst import import_encoder, with_prefix
from audiossl.weights.classifier import load_classifier
from audiossl.weights.export import export_encoder
from audiossl.weights.reading import read_torch_file


class C2FGolden(Golden):
    """Hold a case, and our method with its weights and with its teacher read from a file as users have it."""

    def __init__(self, folder, tmp_path):
        super().__init__(folder)
        config, state = self.config, read_torch_file(folder / "official.ckpt")["state_dict"]
        state = {key.removeprefix("model."): value for key, value in state.items()}
        teacher = tmp_path / "finetuned.ckpt"
        renamed = {
            f"encoder.{k}" if k.startswith("encoder.") else k: v for k, v in with_prefix(state, "teacher.").items()
        }
        torch.save({"state_dict": renamed}, teacher)
        settings, frontend = settings_of("atst_c2f")
        sizes = dict(width=config["embed_dim"], depth=config["depth"], num_heads=config["num_heads"])
        settings |= sizes | dict(drop_path=0.0, project=config["project"], projector_width=64)
        settings |= dict(teacher=str(teacher), teacher_mode="published", distill_weight=config["lambda_d"])
        settings |= dict(teacher_num_heads=config["num_heads"])
        self.model = instantiate(settings, frontend=instantiate(frontend), num_classes=config["num_labels"])
        ours = {f"encoder.{k}": v for k, v in import_encoder(with_prefix(state, "student.")).items()}
        for theirs, name in (("linear.", "head."), ("projector.", "projector."), ("project_linear.", "distill_head.")):
            ours |= {name + k: v for k, v in with_prefix(state, theirs).items()}
        missing, unexpected = self.model.load_state_dict(ours, strict=False)
        assert not unexpected and all(name.startswith("teacher.") for name in missing)

    def of(self, what):
        return self.input["mel"], self.input["lengths"], *([self.input["labels"].float()] if what == "loss" else [])


@pytest.fixture(params=large_cases("atst_c2f_*"))
def golden(request, tmp_path):
    return C2FGolden(request.param, tmp_path)


def test_what_student_and_teacher_say_equals_the_published_logits(golden):
    model, (mel, lengths) = golden.model.eval(), golden.of("logits")
    features = features_of(model.encoder, mel, lengths, None)
    said = {
        "eval.student_feature": features,
        "eval.student_logits": model.head(features),
        "eval.teacher_logits": model.teacher_logits(mel, lengths),
    }
    if model.projector is not None:
        said["eval.student_distill_logits"] = model.distill_logits(features)
    for name in set(said) & set(golden.expected):
        torch.testing.assert_close(
            said[name], golden.expected[name], rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_training_steps_losses_gradients_and_statistics_equal_the_published_ones(golden):
    model = golden.model.train()
    output = model.loss(*golden.of("loss"))
    for name, theirs in (("loss", "loss"), ("label_loss", "loss_c"), ("distill_loss", "loss_d")):
        torch.testing.assert_close(output[name].detach(), golden.expected[f"train.{theirs}"], rtol=0, atol=1e-5)
    output["loss"].backward()
    norms = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
    for name, theirs in golden.case["grad_norms"].items():
        ours = name.replace("student.", "encoder.").replace("patch_embed.patch_embed", "patch_embed.proj")
        ours = (
            ours.replace("norm_frame", "norm")
            .replace("project_linear", "distill_head")
            .replace("pos_embed", "positions.table")
        )
        ours = "head." + ours.removeprefix("linear.") if ours.startswith("linear.") else ours
        assert norms[ours] == pytest.approx(theirs, rel=1e-3, abs=2e-5), name  # before a norm: none in truth
    buffers = dict(model.named_buffers())
    for name, theirs in golden.expected.items():
        if name.startswith("train.buffer."):
            ours = name.removeprefix("train.buffer.").replace("project_linear.", "distill_head.")
            ours = "head." + ours.removeprefix("linear.") if ours.startswith("linear.") else ours
            torch.testing.assert_close(buffers[ours], theirs, rtol=0, atol=1e-5)


def test_a_corrected_teacher_never_changes_while_its_student_trains(golden):
    golden.model.teacher_mode = "corrected"
    model = golden.model.train()
    before = {k: v.clone() for k, v in model.teacher.state_dict().items()}
    model.loss(*golden.of("loss"))["loss"].backward()
    assert all(torch.equal(v, before[k]) for k, v in model.teacher.state_dict().items())
    assert not any(part.training for part in model.teacher.modules())


@pytest.mark.parametrize("has_teacher", [True, False])
def test_micro_batches_say_how_many_clips_they_hold(golden, has_teacher):
    if not has_teacher:
        golden.model.teacher = None
    clips = golden.of("loss")
    assert golden.model.train().loss(*clips)["weight"] == len(clips[0])
    assert golden.model.train().loss(*(part[:1].repeat(3, *[1] * (part.ndim - 1)) for part in clips))["weight"] == 3
    assert "weight" not in golden.model.eval().loss(*clips)


def test_an_exported_classifier_teaches_as_it_was(tmp_path):
    config = dict(zip(("model", "frontend"), settings_of("atst_c2f"), strict=True)) | {
        "data": dict(shards="x", mean=0, std=1)
    }
    config["model"] |= dict(width=24, depth=2, num_heads=2, student="clip", teacher=None, distill_weight=0.0)
    names = ["cat", "dog", "rain"]
    clip = method_from_config(config, vocabulary=names).eval()
    export_encoder(clip, config, tmp_path / "encoder.safetensors", vocabulary=names)
    teacher, frames, _ = load_classifier(str(tmp_path), num_classes=3)
    assert frames == clip.frontend.frames
    for name, value in clip.encoder.state_dict().items():
        assert torch.equal(teacher["encoder"].state_dict()[name], value)
    config["model"] |= dict(student="frame", teacher=str(tmp_path), distill_weight=0.5)
    assert method_from_config(config, vocabulary=names).chunk_frames == frames
    with pytest.raises(UserError, match="trained on other classes"):
        method_from_config(config, vocabulary=["cat", "rain", "dog"])
    with pytest.raises(UserError, match="names 3 classes, the shards have 2"):
        method_from_config(config, vocabulary=["cat", "dog"])
    config["frontend"]["window_ms"] = 40
    with pytest.raises(UserError, match="frontend.window_ms=64, not 40"):
        method_from_config(config, vocabulary=names)


def test_distilling_without_a_teacher_says_how_to_make_one():
    settings, frontend = settings_of("atst_c2f")
    with pytest.raises(UserError, match="model.student=clip model.teacher=null model.distill_weight=0"):
        instantiate(settings | dict(teacher=None), frontend=instantiate(frontend), num_classes=3)
