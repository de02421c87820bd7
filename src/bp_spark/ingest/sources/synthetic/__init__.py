"""A whole synthetic platform of any size: files as a platform would deliver them, and the truth behind them.

In: a :class:`~bp_spark.core.config.SyntheticConfig`. Out, under a folder: the logs of ``kinds`` (``transactions``,
``behaviours``, ``searches``, ``reviews``, ``consultations``: Parquet, a folder ``delivery_day=YYYY-MM-DD`` for each day on
which the platform ships), ``items``, ``users``, ``rates`` (one delivery each), ``source.yaml`` (the mapping with which
:mod:`bp_spark.ingest.sources.files` reads them) and ``truth/`` (not for models).

The model. Each user has a latent purchasing power z ~ N(0, 1). What depends on z does so through a Gaussian copula (Nelsen
2006): a normal score ``rho z + sqrt(1 - rho²) e`` goes through the marginal's quantile function. So the published marginals
stay exact.

- When: Pareto/NBD (Schmittlein, Morrison & Colombo 1987). While the user is alive, orders are a Poisson process with rate
  lambda ~ Gamma(r, alpha), which depends on z. The lifetime from sign-up is exponential with rate mu ~ Gamma(s, beta). The
  shapes r and s are the estimates for CDNOW (Fader, Hardie & Lee 2005a); the scales make a busier shop. Users sign up and drop
  out between days. Weekdays, June 18, November 11 and December modulate the rate by thinning (Lewis & Shedler 1979), with
  mean 1 over the period.
- How much: Gamma-Gamma (Fader, Hardie & Lee 2005b; p, q, gamma as estimated for CDNOW). An order's value is Gamma(p, nu) with
  nu ~ Gamma(q, gamma), which depends on z. The value is split over 1-6 lines. A line's item is of the price tier that the
  line's value buys, so z shows in the tiers.
- What: each user prefers a department. Within a type and price tier, items follow Zipf's law with exponent 1. The activity of
  users is heavy-tailed by the Gamma mixture above (r < 1).
- Around it: an order is a visit that converted; visits are a Poisson process with rate lambda / conversion. Visits leave
  browse, click, cart, favourite, coupon and search events, and consultations; orders leave reviews and refunds. z moves
  conversion, coupon use and ratings, and by ``words_of_power`` whether searches, reviews and consultations are about quality or
  low prices, in English and Chinese.

Every draw is a hash of (seed, purpose, user, number of the visit, ...), never ``rand()``: the same configuration gives the same
rows on any cluster.

Dirt. A uniform per row of the logs decides whether the row is spoiled in one way
(:data:`~bp_spark.ingest.sources.synthetic.dirt.SPOILS`), delivered late, delivered a second time, or none of these.
``truth/dirt`` holds how many rows of each kind were written.

Fader, Hardie & Lee 2005a: "Counting your customers" the easy way, Marketing Science 24(2). 2005b: RFM and CLV: using
iso-value curves, Journal of Marketing Research 42(4), with the note "The Gamma-Gamma model of monetary value" (2013).
"""

from __future__ import annotations

from bp_spark.ingest.sources.synthetic.platform import Summary, generate

__all__ = ["Summary", "generate"]
