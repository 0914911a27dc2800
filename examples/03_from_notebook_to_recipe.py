# %% [markdown]
# # From notebook to recipe
#
# Find settings here, then run the same for hours from the command line, where runs are resumed
# and use several GPUs. Seconds on two CPU cores; needs the extra `demo`.

# %%
import subprocess
import sys
from pathlib import Path

import dreamkit

teacher = dreamkit.load_teacher("bundled:digits_resnet8")
dreams = dreamkit.invert(teacher, 64, steps=50, batch_size=64)
small = dreamkit.prune(
    teacher,
    dreams,
    flops=0.6,
    limits={"chunk": 4},
    recovery={"steps": 50, "batch_size": 32},
)
small

# %% [markdown]
# ## Its recipe
#
# The recipe dreams the same images, prunes and recovers by the same options. Images or a
# network that only the notebook has would be places to fill in. This recipe is judged on
# scikit-learn's held-out digits as well.

# %%
recipe = small.to_recipe(name="from_notebook")
Path("from_notebook.yaml").write_text(recipe + "evaluation: {source: digits}\n")
print(recipe)

# %% [markdown]
# ## Run it
#
# In a terminal: `dreamkit run from_notebook.yaml`. Interrupted, the same command goes on.


# %%
def dreamkit_command(*words: str) -> None:
    """Run a command of dreamkit, and show what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "dreamkit", *words], capture_output=True, text=True, check=True
    )
    print(done.stdout)


dreamkit_command("validate", "from_notebook.yaml")
dreamkit_command("run", "from_notebook.yaml")

# %% [markdown]
# ## And back
#
# What a run leaves can be opened here.

# %%
student = dreamkit.load_student("runs/from_notebook/student")
again = dreamkit.load_dreams("runs/from_notebook")
same = bool((again.images == dreams.images).all())
print(f"the run's dreams are those of this notebook: {same}")

# %%
again.show()
