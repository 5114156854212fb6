from .driving.kitti import KittiStyleDataModule as KittiStyleDataModule
from .driving.nuscenes import NuScenesDataModule as NuScenesDataModule
from .recommendation.ratings import RatingsDataModule as RatingsDataModule
from .vision.cifar import CIFARDataModule as CIFARDataModule
from .vision.digits import DigitsDataModule as DigitsDataModule
from .vision.imagenet import ImageNetDataModule as ImageNetDataModule
