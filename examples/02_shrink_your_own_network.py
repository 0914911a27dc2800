# %% [markdown]
# # Shrink a network of your own
#
# A network that only this notebook knows is trained, inverted, pruned without its data, saved
# and loaded. Half a minute on two CPU cores; needs the extra `demo`.

# %%
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import dreamkit


class Net(nn.Module):
    """Three convolutions; your own network stands here."""

    def __init__(self, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, classes) of images (N, 1, 8, 8)."""
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


# %% [markdown]
# ## Train it
#
# With a network of your own this is done already, and its data may be gone.

# %%
data = load_digits()
pixels = (torch.tensor(data.images)[:, None] * 255 / 16).round().to(torch.uint8)
labels = torch.tensor(data.target)
train, test = slice(0, 1257), slice(1257, None)
mean, std = 0.3053, 0.3764

torch.manual_seed(0)
net = Net()
inputs = (pixels / 255 - mean) / std
optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
for _ in range(20):
    for batch in torch.randperm(1257).split(64):
        loss = nn.functional.cross_entropy(net(inputs[train][batch]), labels[train][batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
net.eval()

# %% [markdown]
# ## Dream
#
# What dreamkit must be told of a network: the size of its images, and how training normalised
# them.

# %%
dreams = dreamkit.invert(
    net, 512, size=(1, 8, 8), mean=(mean,), std=(std,), steps=100, batch_size=256
)
dreams

# %%
dreams.show()

# %% [markdown]
# ## Prune
#
# The real digits report accuracy. They are neither trained on nor chosen by.

# %%
small = dreamkit.prune(
    net,
    dreams,
    flops=0.5,
    size=(1, 8, 8),
    mean=(mean,),
    std=(std,),
    evaluation=(pixels[test], labels[test]),
    limits={"chunk": 4},
    recovery={"steps": 300, "batch_size": 64},
)
small

# %% [markdown]
# What was left alone, and why:

# %%
for skipped in small.skipped:
    print(skipped["group"], "-", skipped["reason"])

# %% [markdown]
# ## Save, and load
#
# The folder has a plain state dict and says which channels are left. Your class is not in it,
# so it is given when the student is loaded.

# %%
small.save("own_student")
again = dreamkit.load_student("own_student", builder=Net)
logits = again(small.card.normalise(pixels[test]))
accuracy = float((logits.argmax(1) == labels[test]).float().mean())
print(f"loaded: {accuracy:.4f}, as it was saved: {small.metrics['student.accuracy']:.4f}")
