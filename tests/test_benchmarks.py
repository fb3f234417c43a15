"""The benchmarks: what they ask of the scripts is understood. To run them takes hours."""

import likelihood
import pytest
import train

from mnist_ddpm import MNISTUNet2DModel


@pytest.mark.parametrize("change", likelihood.CHANGES)
def test_choices_for_likelihood_are_flags_of_the_training_script(change, tmp_path):
    args = train.parse_args(likelihood.flags_of(change, tmp_path))
    unet = MNISTUNet2DModel.from_config(MNISTUNet2DModel.load_config(args.model_config_name_or_path))
    default = train.parse_args(["--model_config_name_or_path", str(tmp_path)])
    nothing_chosen = vars(args).keys() - {"command"} == {
        name for name in vars(args).keys() - {"command"} if getattr(args, name) == getattr(default, name)
    }
    assert nothing_chosen == (change == "none of them")
    assert (unet.config.patch_size == 1) == (change not in ("default U-Net, with Fourier features", "none of them"))
