"""The public names, which docs/api.md documents; ``olvae/__init__.py`` imports each when used."""

from .data.dataset import SamplePhotographs as SamplePhotographs
from .data.hub import HuggingFaceSource as HuggingFaceSource
from .data.hub import TorchvisionSource as TorchvisionSource
from .data.mix import MixSource as MixSource
from .data.picture_folder import FolderSource as FolderSource
from .data.shards.latent_source import LatentSource as LatentSource
from .data.shards.webdataset import WebDatasetSource as WebDatasetSource
from .evaluation.runner import Request as Request
from .evaluation.runner import evaluate as evaluate
from .export.as_diffusers import AutoencoderLiteVAE as AutoencoderLiteVAE
from .losses.cutmix import cutmix as cutmix
from .losses.cutmix import cutmix_consistency as cutmix_consistency
from .losses.gan_losses import LeCam as LeCam
from .losses.gan_losses import discriminator_accuracy as discriminator_accuracy
from .losses.gan_losses import discriminator_loss as discriminator_loss
from .losses.gan_losses import generator_loss as generator_loss
from .losses.gan_losses import r1_penalty as r1_penalty
from .losses.objective import Objective as Objective
from .losses.perceptual import LPIPS as LPIPS
from .losses.terms import gaussian_loss as gaussian_loss
from .losses.terms import kl_loss as kl_loss
from .losses.terms import wavelet_loss as wavelet_loss
from .metrics import METRICS as METRICS
from .metrics import build_metrics as build_metrics
from .models.adversary import Adversary as Adversary
from .models.autoencoder import LiteVAE as LiteVAE
from .models.large.tiling import GIB as GIB
from .models.liteautoencoder import LiteAutoencoderKL as LiteAutoencoderKL
from .models.loading.targets import find_target as find_target
from .models.weight_files import config_inside as config_inside
from .modules.gigagan import GigaGAN as GigaGAN
from .modules.patchgan import PatchGAN as PatchGAN
from .modules.unetgan import UNetGAN as UNetGAN
from .modules.wavelet import dwt2 as dwt2
from .modules.wavelet import idwt2 as idwt2
from .modules.wavelet import wavedec2 as wavedec2
from .modules.wavelet import waverec2 as waverec2

__version__: str
