"""The Celery app that Flower watches, with the broker and prefix of the settings: `celery --app=farm.flower flower`."""

from farm.doorbell import WORKER_TIMEOUT_SECONDS, make_app
from farm.settings import settings

app = make_app(settings(), timeout=WORKER_TIMEOUT_SECONDS)
