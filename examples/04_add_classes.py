# %% [markdown]
# # Add classes
#
# A network knows the digits 0 to 6. It learns 7, 8 and 9 from new images, and keeps the old
# ones without theirs: it dreams them. Half a minute on two CPU cores; needs the extra `demo`.

# %%
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import dreamkit

teacher = dreamkit.load_teacher("bundled:digits7_resnet8")

data = load_digits()
pixels = (torch.tensor(data.images)[:, None] * 255 / 16).round().to(torch.uint8)
labels = torch.tensor(data.target)
train, test = train_test_split(
    torch.arange(len(labels)), test_size=0.3, random_state=0, stratify=data.target
)


def digits(rows: torch.Tensor, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and labels of some digits, labelled from 0."""
    chosen = rows[(labels[rows] >= first) & (labels[rows] <= last)]
    return pixels[chosen], labels[chosen] - first


# %% [markdown]
# ## With dreams of the old classes

# %%
kept = dreamkit.extend(
    teacher,
    digits(train, 7, 9),
    test=digits(test, 7, 9),
    new_names=("7", "8", "9"),
    evaluation=digits(test, 0, 6),
    images_per_class=64,
    synthesis={"steps": 100, "batch_size": 256},
    steps=300,
    batch_size=64,
    lr=0.05,
)
kept

# %% [markdown]
# ## Without: plain fine-tuning forgets

# %%
forgot = dreamkit.extend(
    teacher,
    digits(train, 7, 9),
    test=digits(test, 7, 9),
    new_names=("7", "8", "9"),
    evaluation=digits(test, 0, 6),
    losses={"cross_entropy": 1},
    replay=False,
    steps=300,
    batch_size=64,
    lr=0.05,
)
forgot

# %%
for name, result in (("with dreams", kept), ("without", forgot)):
    old, new = result.metrics["step1.base.accuracy"], result.metrics["step1.new.accuracy"]
    print(f"{name}: old digits {old:.4f}, new digits {new:.4f}")
print(kept.card.class_names)
