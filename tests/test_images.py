import numpy as np
from PIL import Image

from mnist_ddpm.images import image_grid


def test_image_grid():
    images = [Image.new("L", (2, 1), color=i + 1) for i in range(3)]
    np.testing.assert_array_equal(np.asarray(image_grid(images)), [[1, 1, 2, 2], [3, 3, 0, 0]])
    np.testing.assert_array_equal(np.asarray(image_grid(images, columns=1)), [[1, 1], [2, 2], [3, 3]])
