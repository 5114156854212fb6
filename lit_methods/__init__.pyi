from .catalog import Technique as Technique
from .lidar.minkunet import MinkUNet as MinkUNet
from .lidar.segmentor import PointSegmentor as PointSegmentor
from .lidar.superflow import SuperFlow as SuperFlow
from .lidar.teachers import DINOv2 as DINOv2
from .lidar.teachers import PatchStatistics as PatchStatistics

__version__: str
