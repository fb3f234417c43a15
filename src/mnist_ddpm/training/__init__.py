"""Training: what a run is made of (batches, loss, optimizers, checkpoints), and the trainer that puts it together.

    from mnist_ddpm.training import Trainer, TrainingArguments

    Trainer(TrainingArguments(output_dir="digits", num_epochs=1)).train()

`import mnist_ddpm` does not import it: it needs the packages of `pip install 'mnist-ddpm[train]'`.
"""

from mnist_ddpm.training.arguments import TrainingArguments

try:
    from mnist_ddpm.training.trainer import Trainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: pip install 'mnist-ddpm[train]'", name=error.name) from error

__all__ = ["Trainer", "TrainingArguments"]
