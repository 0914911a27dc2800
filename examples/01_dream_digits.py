# %% [markdown]
# # Dream digits
#
# Dream images out of a digit classifier, prune it by them, and teach another network. No
# training image is used. Half a minute on two CPU cores; needs the extras `demo` and `onnx`.
#
# This file is a notebook in jupytext's percent format: open it in Jupyter or VS Code, or run it
# as it is.

# %%
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import dreamkit

teacher = dreamkit.load_teacher("bundled:digits_resnet8")
print(teacher.card)

# %% [markdown]
# ## Dream
#
# 512 images in 100 steps. For better ones leave `steps` out: 200.

# %%
dreams = dreamkit.invert(teacher, 512, steps=100, batch_size=256)
dreams

# %%
dreams.show()

# %% [markdown]
# ## Real digits, only to judge by
#
# The teacher was trained on the other 70 %.

# %%
data = load_digits()
_, images, _, labels = train_test_split(
    data.images, data.target, test_size=0.3, random_state=0, stratify=data.target
)
pixels = (torch.tensor(images)[:, None] * 255 / 16).round().to(torch.uint8)  # (540, 1, 8, 8)
held_out = (pixels, torch.tensor(labels))

# %% [markdown]
# ## Half of the FLOPs

# %%
small = dreamkit.prune(
    teacher,
    dreams,
    flops=0.5,
    evaluation=held_out,
    limits={"chunk": 4},
    recovery={"steps": 300, "batch_size": 64},
)
small

# %% [markdown]
# ## A student of another architecture, from scratch

# %%
torch.manual_seed(0)
student = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1, bias=False),
    nn.BatchNorm2d(16),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False),
    nn.BatchNorm2d(32),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(32 * 4 * 4, 10),
)
tiny = dreamkit.distill(
    teacher, student, dreams, steps=600, batch_size=64, lr=0.1, evaluation=held_out
)
tiny

# %% [markdown]
# ## What does it see in the teacher's dreams?

# %%
said = dreamkit.judge(teacher, dreams, {"tiny": tiny.model}, reference=held_out)
said

# %% [markdown]
# ## Keep
#
# Dreams are saved into a new or empty folder: remove it before this cell runs again.

# %%
dreams.save("digits_dreamed")
small.save("digits_student")
small.export("digits_student.onnx")

again = dreamkit.load_student("digits_student")
logits = again(small.card.normalise(pixels))
accuracy = float((logits.argmax(1) == held_out[1]).float().mean())
print(f"loaded: {accuracy:.4f}, as it was saved: {small.metrics['student.accuracy']:.4f}")
