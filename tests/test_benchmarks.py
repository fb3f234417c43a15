"""The benchmarks: what they ask of the scripts is understood. To run them takes hours."""

import likelihood
import pytest
import recipes
import time_to_quality
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


@pytest.mark.parametrize("change", recipes.CHANGES)
def test_recipes_are_flags_and_networks_that_differ_from_the_default(change):
    flags, unet_config = recipes.CHANGES[change]
    args, default = vars(train.parse_args(flags)), vars(train.parse_args([]))
    changed = {name for name in args.keys() - {"command"} if args[name] != default[name]}
    assert len(changed) == len(flags) / 2 or flags == ["--no-use_ema"]
    same_network = MNISTUNet2DModel(**unet_config).config == MNISTUNet2DModel().config
    assert (not changed and same_network) == (change == "none")


def test_only_those_that_train_can_sample(capsys):
    with pytest.raises(SystemExit):
        time_to_quality.parse_args(["--contenders", "ours", "stock", "--sampling_contenders", "ours", "tuned"])
    assert "--sampling_contenders: some of ['ours', 'stock'], got ['ours', 'tuned']" in capsys.readouterr().err
