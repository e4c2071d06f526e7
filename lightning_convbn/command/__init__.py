"""The command ``lightning-convbn``: inspect, measure, export."""
