"""``fastgan dcgan``: what ``python main.py`` of ``pytorch/examples/dcgan`` does, by the engine.

The flags, the line logged at each step and the files written are the example's.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastgan.cli import DONE
from fastgan.cli.parse import parse
from fastgan.errors import InputError, NotBuiltError
from fastgan.files import replace_file
from fastgan.nn.sizes import split_size

if TYPE_CHECKING:
    import torch

    from fastgan.data.images import ImageSet

_DATASETS = ("cifar10", "lsun", "mnist", "imagenet", "folder", "lfw", "fake")


@dataclasses.dataclass(frozen=True)
class DCGANArgs:
    """The DCGAN example of PyTorch, with its flags, its log line and its files.

    Attributes:
        dataset: cifar10 | lsun | mnist | imagenet | folder | lfw | fake
        dataroot: path to dataset
        workers: number of data loading workers
        batchSize: input batch size
        imageSize: the height / width of the input image to network
        nz: size of the latent z vector
        ngf: number of generator filters
        ndf: number of discriminator filters
        niter: number of epochs to train for
        lr: learning rate
        beta1: beta1 for adam
        dry_run: check a single training cycle works
        ngpu: number of GPUs to use
        netG: path to netG (to continue training)
        netD: path to netD (to continue training)
        outf: folder to output images and model checkpoints
        manualSeed: manual seed
        classes: comma separated list of classes for the lsun data set
        accel: enables accelerator
    """

    dataset: str
    dataroot: Annotated[str | None, tyro.conf.arg(metavar="STR")] = None
    workers: int = 2
    batchSize: Annotated[int, tyro.conf.arg(name="batchSize")] = 64
    imageSize: Annotated[int, tyro.conf.arg(name="imageSize")] = 64
    nz: int = 100
    ngf: int = 64
    ndf: int = 64
    niter: int = 25
    lr: float = 0.0002
    beta1: float = 0.5
    dry_run: bool = False
    ngpu: int = 1
    netG: Annotated[str, tyro.conf.arg(name="netG")] = ""
    netD: Annotated[str, tyro.conf.arg(name="netD")] = ""
    outf: str = "."
    manualSeed: Annotated[int | None, tyro.conf.arg(name="manualSeed", metavar="INT")] = None
    classes: str = "bedroom"
    accel: bool = False

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            InputError: names the flag, its value and what it takes.
        """
        if self.dataset not in _DATASETS:
            raise InputError(f"--dataset {self.dataset!r}: choose from {', '.join(_DATASETS)}")
        if self.dataroot is None and self.dataset != "fake":
            raise InputError(f"--dataroot is required for --dataset {self.dataset}")
        for name in ("batchSize", "nz", "ngf", "ndf", "niter"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.workers < 0:
            raise InputError(f"--workers {self.workers} must be at least 0")
        if not 0.0 < self.lr < float("inf"):
            raise InputError(f"--lr {self.lr} must be greater than 0")
        if not 0.0 <= self.beta1 < 1.0:
            raise InputError(f"--beta1 {self.beta1} must be at least 0 and less than 1")
        if self.manualSeed is not None and not 0 <= self.manualSeed < 2**63:
            raise InputError(f"--manualSeed {self.manualSeed} must be from 0 to 2^63 - 1")
        try:
            split_size(self.imageSize)
        except InputError as error:
            raise InputError(f"--imageSize: {error}") from None
        for name in ("netG", "netD"):
            if getattr(self, name) and not Path(getattr(self, name)).is_file():
                raise InputError(f"--{name} {getattr(self, name)!r} does not exist")
        if Path(self.outf).exists() and not Path(self.outf).is_dir():
            raise InputError(f"--outf {self.outf!r} is a file; give a folder")


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    args = parse(DCGANArgs, "fastgan dcgan", argv)
    args.check()
    print(str(args).replace("DCGANArgs", "Namespace", 1))
    seed = args.manualSeed if args.manualSeed is not None else random.randint(1, 10000)
    print("Random Seed: ", seed)

    import torch

    torch.manual_seed(seed)
    random.seed(seed)
    device = torch.device("cpu")
    if args.accel and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator() or device
    print(f"Using device: {device}")
    if args.ngpu > 1 and device.type != "cpu":
        raise NotBuiltError(f"--ngpu {args.ngpu}: training on several GPUs is not built yet; use 1")
    data = _load(args)
    try:
        Path(args.outf).mkdir(parents=True, exist_ok=True)
        _train(args, data, device, seed)
    except OSError as error:
        raise InputError(f"--outf {args.outf!r} cannot be written: {error.strerror}") from error
    return DONE


def _train(args: DCGANArgs, data: ImageSet, device: torch.device, seed: int) -> None:
    import torch
    from torchvision.utils import save_image

    from fastgan.data.loader import Loader
    from fastgan.engine.engine import Engine
    from fastgan.nn.dcgan import DCGANDiscriminator, DCGANGenerator
    from fastgan.train.checkpoint import read_state_dict

    netG: torch.nn.Module = DCGANGenerator(args.nz, args.ngf, data.nc, args.imageSize)
    _continue(netG, "netG", args.netG, read_state_dict)
    print(netG)
    netD: torch.nn.Module = DCGANDiscriminator(args.ndf, data.nc, args.imageSize)
    _continue(netD, "netD", args.netD, read_state_dict)
    print(netD)
    fixed_noise = torch.randn(args.batchSize, args.nz, 1, 1).to(device)
    engine = Engine(netG, netD, lr=args.lr, betas=(args.beta1, 0.999), device=device, seed=seed)
    loader = Loader(data, min(args.batchSize, len(data)), seed=seed, device=device)
    epochs = 1 if args.dry_run else args.niter
    out = Path(args.outf)
    for epoch in range(epochs):
        for i, (real, _) in enumerate(loader):
            stats = engine.step(real).to_dict()
            print(
                f"[{epoch}/{epochs}][{i}/{len(loader)}] Loss_D: {stats['loss_d']:.4f} "
                f"Loss_G: {stats['loss_g']:.4f} D(x): {stats['d_real']:.4f} "
                f"D(G(z)): {stats['d_fake']:.4f} / {stats['d_fake_g']:.4f}"
            )
            if i % 100 == 0:
                save_image(real, out / "real_samples.png", normalize=True)
                # In training mode, as the example does: G's running statistics take part in it.
                with torch.no_grad():
                    fake = engine.netG(fixed_noise)
                save_image(fake, out / f"fake_samples_epoch_{epoch:03d}.png", normalize=True)
            if args.dry_run:
                break
        for name, net in (("netG", engine.netG), ("netD", engine.netD)):
            _save(net, out / f"{name}_epoch_{epoch}.pth")


def _continue(net: torch.nn.Module, name: str, path: str, read: Any) -> None:
    if path:
        try:
            net.load_state_dict(read(Path(path)))
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"--{name} {path!r} is of other networks: {reason}") from error


def _save(net: torch.nn.Module, path: Path) -> None:
    import io

    import torch

    buffer = io.BytesIO()
    torch.save({key: value.contiguous() for key, value in net.state_dict().items()}, buffer)
    replace_file(path, buffer.getvalue())


def _load(args: DCGANArgs) -> ImageSet:
    from fastgan.data.images import load_images

    source: Any = args.dataroot
    nc = 3
    if args.dataset in ("cifar10", "mnist", "lsun", "fake"):
        source = _torchvision_dataset(args)
        nc = 1 if args.dataset == "mnist" else 3
    data = load_images(source, args.imageSize, nc, workers=max(args.workers, 1))
    for name, reason in data.bad:
        print(f"Skipped {name}: {reason}")
    return data


def _torchvision_dataset(args: DCGANArgs) -> Any:
    from torchvision import datasets

    try:
        if args.dataset == "cifar10":
            return datasets.CIFAR10(root=str(args.dataroot), download=True)
        if args.dataset == "mnist":
            return datasets.MNIST(root=str(args.dataroot), download=True)
        if args.dataset == "fake":
            return datasets.FakeData(image_size=(3, args.imageSize, args.imageSize))
        classes = [f"{name}_train" for name in args.classes.split(",")]
        return datasets.LSUN(root=str(args.dataroot), classes=classes)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--dataset {args.dataset} at {args.dataroot!r}: {reason}") from error
