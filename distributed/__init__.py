"""One run on several ranks: exchanges, division of the work, requests to stop, divided weights."""
