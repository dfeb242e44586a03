"""Click log to training rows: event-time window, label join, corrections, offsets, item numbers. numpy only."""
