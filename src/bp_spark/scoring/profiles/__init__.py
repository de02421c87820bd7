"""Profiles: what people and applications read about each user, made from scores, features and user-days of a date.

``category_affinity`` serves recommendation. ``user_profile`` is the source of ``risk_control``, ``customer_service`` and, with
the users' regions, ``market_segments``. ``docs/profiles.md`` defines every part in words, with a query for each table.

Each function depends on its input rows alone. Sums over users or days are of whole numbers, so they are the same on any
cluster.
"""
