from .driving.kitti import KittiStyleDataModule as KittiStyleDataModule
from .driving.nuscenes import NuScenesDataModule as NuScenesDataModule
