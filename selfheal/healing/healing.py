"""Healing: the parts that keep the disk and the database of a store the same, made to know each other."""

from ..aio.tasks import Tasks
from ..db import ImageStorage
from ..disk.directory import UploadsDirectory
from ..disk.exclusions import Exclusions
from ..events import Events
from .background import BackgroundChecks
from .changes import Follower
from .disk_copies import DiskCopies
from .publish import Publisher
from .reading import Reader
from .reconcile import Reconciler
from .restore import Restorer
from .saving import Saver
from .sweep import Sweep
from .upkeep import Upkeep
from .vanished import VanishedFiles
from .watch import Watch


class Healing:
    """The parts of one store. `settled_after` and `sweep_every` (0 for never) in seconds; `watch` needs its extra."""

    def __init__(
        self,
        disk: UploadsDirectory,
        database: ImageStorage,
        exclusions: Exclusions,
        events: Events,
        tasks: Tasks,
        *,
        deadline: float,
        settled_after: float,
        sweep_every: float,
        watch: bool,
    ) -> None:
        both, publisher = (disk, database), Publisher(disk)
        copies = DiskCopies(*both, publisher, events)
        self.restorer = Restorer(*both, publisher, copies, events, tasks, deadline=deadline)
        self.reconciler = Reconciler(*both, copies, events, tasks, exclusions=exclusions, settled_after=settled_after)
        self.background = BackgroundChecks(disk, self.reconciler, copies, Follower(database, disk), events, tasks)
        restorer, reconciler, background = self.restorer, self.reconciler, self.background
        self.saver = Saver(*both, publisher, copies, restorer, reconciler, background, events, tasks)
        self.reader = Reader(*both, restorer, reconciler, background)
        sweep = Sweep(disk, reconciler, background, events, sweep_every)
        works, before_stop = [sweep.run] if sweep_every else [], []
        if watch:
            vanished = VanishedFiles(*both, restorer, reconciler, self.saver)
            watching = Watch(disk, background, vanished, tasks, sweep.hurry)
            works.append(watching.run)
            before_stop.append(watching.finish)
        self.upkeep = Upkeep(tasks.home, works, before_stop)
