"""How endpoints, deliveries and events are called outside; see `app.ids`."""

from __future__ import annotations

from typing import Final

ENDPOINT: Final = "we_"
DELIVERY: Final = "wd_"
EVENT: Final = "evt_"
