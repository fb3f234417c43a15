"""What a training run is made of: batches, loss, optimizers, checkpoints, and the trainer that puts them together.

`import mnist_ddpm` does not import it: it needs the packages of `pip install 'mnist-ddpm[train]'`.
"""
