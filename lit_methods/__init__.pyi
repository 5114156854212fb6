from .catalog import Technique as Technique
from .consistency_models.ict import ConsistencyTraining as ConsistencyTraining
from .consistency_models.networks import NoiseMLP as NoiseMLP
from .consistency_models.networks import SmallUNet as SmallUNet
from .consistency_models.rcm import RCM as RCM
from .consistency_models.rcm import RingTeacher as RingTeacher
from .consistency_models.slct import SLCT as SLCT
from .consistency_models.slct import NonScalingLayerNorm as NonScalingLayerNorm
from .language.causal_lm import CausalLM as CausalLM
from .lidar.minkunet import MinkUNet as MinkUNet
from .lidar.segmentor import PointSegmentor as PointSegmentor
from .lidar.superflow import SuperFlow as SuperFlow
from .lidar.teachers import DINOv2 as DINOv2
from .lidar.teachers import PatchStatistics as PatchStatistics
from .recommendation.lightgcn import LightGCN as LightGCN
from .recommendation.multvae import MultVAE as MultVAE
from .recommendation.neumf import NeuMF as NeuMF
from .superres.module import SuperResolution as SuperResolution
from .superres.networks import EDSR as EDSR
from .superres.networks import Swin2SRNetwork as Swin2SRNetwork
from .vision.classifier import ImageClassifier as ImageClassifier
from .vision.networks import MLP as MLP
from .vision.networks import CifarResNet as CifarResNet
from .vision.networks import CifarResNet18 as CifarResNet18
from .vision.networks import SmallConvNet as SmallConvNet
from .vision.networks import TimmNetwork as TimmNetwork

__version__: str
