"""Names that exports give their columns, by column of the contract; the first that a file has is taken.

A name is compared in lower case, without blanks and signs: ``Customer ID`` is ``customerid``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

NAMES: Mapping[str, tuple[str, ...]] = {
    "user_id": (
        *("customeruniqueid", "customerid", "userid", "memberid", "clientid", "buyerid", "shopperid", "householdid"),
        *("custid", "customerno", "customernumber", "customerkey", "accountid", "loyaltyid", "cardid", "visitorid"),
        *("customercode", "customeremail", "billingemail", "useremail", "email", "emailaddress", "customer", "user"),
        *("member", "client", "buyer", "uid", "who", "shopper", "household"),
        *("kundennr", "kundennummer", "kundenid", "kunde"),
    ),
    "order_id": (
        *("orderid", "ordernumber", "orderno", "ordername", "invoiceno", "invoiceid", "invoicenumber", "invoice"),
        *("basketid", "transactionid", "transactionno", "receiptid", "receiptno", "receipt", "ticketid", "ticket"),
        *("purchaseid", "saleid", "billno", "incrementid", "checkoutid", "order", "transaction", "usersession"),
        *("sessionid", "id"),
        *("bestellnr", "bestellnummer", "auftragsnr", "auftragsnummer", "rechnungsnr", "rechnungsnummer", "belegnr"),
    ),
    "line_id": (
        *("lineid", "orderlineid", "orderitemid", "lineitemid", "lineitemsid", "linenumber", "lineno", "linesid"),
        *("orderlinenumber", "itemsid", "itemid", "positionid", "position"),
    ),
    "item_id": (
        *("sku", "itemsku", "lineitemsku", "lineitemssku", "itemssku", "productsku", "productid", "stockcode"),
        *(
            "productcode",
            "itemproductid",
            "articleid",
            "articleno",
            "articlenumber",
            "itemcode",
            "itemid",
            "asin",
            "ean",
        ),
        *("upc", "productkey", "product", "article", "item"),
        *("artikelnr", "artikelnummer", "artikel", "produkt"),
    ),
    "ts": (
        *(
            "invoicedate",
            "orderdate",
            "orderpurchasetimestamp",
            "purchasedate",
            "transactiondate",
            "transactiontimestamp",
            "orderedat",
        ),
        *("processedat", "createdat", "orderdatetime", "ordertime", "eventtime", "purchasedat", "soldat", "saledate"),
        *("paidat", "datetime", "timestamp", "date", "time", "ts", "at", "day", "created", "placedat", "datecreated"),
        *("bestelldatum", "rechnungsdatum", "kaufdatum", "datum"),
    ),
    "quantity": (
        *("quantity", "qty", "lineitemquantity", "lineitemsquantity", "itemsquantity", "itemquantity", "qtyordered"),
        *("quantityordered", "orderquantity", "units", "pieces", "amountofitems", "count", "numitems"),
        *("quantitypurchased", "menge", "anzahl", "stueck"),
    ),
    "line_total": (
        *(
            "linetotal",
            "rowtotal",
            "itemtotal",
            "lineamount",
            "linenetamount",
            "lineitemtotal",
            "itemsubtotal",
            "salesvalue",
        ),
        *("amount", "paid", "amountpaid", "revenue", "netamount", "netsales", "sales", "salesamount", "spend", "spent"),
        *(
            "linerevenue",
            "totalamount",
            "total",
            "value",
            "payment",
            "totalprice",
            "turnover",
            "grossamount",
            "subtotal",
        ),
        *("betrag", "umsatz", "summe", "gesamtpreis"),
    ),
    "order_total": (
        *("currenttotalprice", "totalpaid", "ordertotal", "ordervalue", "orderamount", "grandtotal", "invoicetotal"),
        *("baskettotal", "totalprice", "totalpriceset"),
    ),
    "unit_price": (
        *("unitprice", "priceperunit", "lineitemprice", "lineitemsprice", "itemsprice", "itemprice", "priceeach"),
        *("pieceprice", "sellingprice", "unitcost", "price"),
        *("einzelpreis", "preis"),
    ),
    "refund": ("itemrefunded", "amountrefunded", "refundedamount", "refundamount", "refundedtotal"),
    "discount": ("discount", "discountamount", "linediscount", "itemdiscount", "reduction", "totaldiscount", "rebate"),
    "currency": ("currency", "currencycode", "ordercurrency", "ordercurrencycode", "curr"),
    "status": (
        *("status", "orderstatus", "financialstatus", "state", "orderstate", "paymentstatus", "transactionstatus"),
        *("invoicestatus",),
        *("itemstatus"),
    ),
    "cancelled_at": (
        "cancelledat",
        "canceledat",
        "cancelled",
        "canceled",
        "iscancelled",
        "iscanceled",
        "cancellationdate",
    ),
    "test": ("test", "istest", "testorder"),
    "country": ("country", "billingcountry", "shippingcountry", "countryname", "countrycode"),
    "title": (
        *("title", "productname", "itemname", "producttitle", "description", "productdescription", "lineitemname"),
        *("lineitemstitle", "itemstitle", "lineitemsname", "articlename", "name"),
    ),
    "category": (
        *("categorycode", "category", "productcategory", "productcategoryname", "categoryname", "categorypath"),
        *("department", "categoryid"),
    ),
    "brand": ("brand", "brandname", "manufacturer", "lineitemsvendor", "vendor", "maker"),
    "price": ("price", "listprice", "unitprice", "lineitemsprice", "itemprice"),
    "action": (
        "eventtype",
        "event",
        "action",
        "eventname",
        "type",
        "behavior",
        "behaviour",
        "behaviortype",
        "activity",
    ),
    "dwell_s": ("dwells", "dwell", "dwelltime", "durations", "duration", "seconds", "timeonpage"),
    "query": ("query", "searchterm", "searchquery", "keyword", "keywords", "searchtext", "term", "q", "text"),
    "clicked_item_id": ("clickeditemid", "clickedproductid", "clickedsku", "clicked"),
    "rating": ("rating", "stars", "score", "overall", "reviewscore", "starrating", "grade"),
    "text": (
        "text",
        "reviewtext",
        "body",
        "review",
        "comment",
        "content",
        "reviewbody",
        "reviewcommentmessage",
        "message",
    ),
}
CANCELLED = (
    *("cancelled", "canceled", "void", "voided", "failed", "pending", "pending_payment", "payment_pending", "fraud"),
    *("unavailable", "rejected", "declined", "expired", "unpaid", "draft", "abandoned", "on-hold", "storno", "deleted"),
    *("holded", "authorized", "checkout-draft", "trash"),
)
"""States of an order that no money was paid for, in lower case."""
SURELY_CANCELLED = ("cancelled", "canceled", "void", "voided", "failed")
"""States that are left out even if no row that was looked at has them."""
PAID = (
    "paid",
    "complete",
    "completed",
    "processing",
    "shipped",
    "delivered",
    "fulfilled",
    "closed",
    "invoiced",
    "done",
)
REFUNDED = ("refunded", "partially_refunded", "returned", "partially refunded")
PURCHASES = ("purchase", "buy", "bought", "order", "transaction", "checkout", "sale", "purchased", "paid")
"""Events that are purchases."""
ACTIONS = {
    **dict.fromkeys(("view", "pv", "browse", "product_view", "detail", "visit", "view_item", "page_view"), "browse"),
    "click": "click",
    **dict.fromkeys(("cart", "addtocart", "add_to_cart", "basket", "add_to_basket"), "cart"),
    **dict.fromkeys(("fav", "favourite", "favorite", "wishlist", "like", "add_to_wishlist", "collect"), "favourite"),
    "coupon": "coupon",
}
"""Event of a platform -> action of the contract."""
COUNTRIES: Mapping[str, tuple[str, str | None]] = {
    **dict.fromkeys(("united kingdom", "uk", "gb", "great britain"), ("GBP", "Europe/London")),
    **dict.fromkeys(("germany", "de", "deutschland"), ("EUR", "Europe/Berlin")),
    **dict.fromkeys(("france", "fr"), ("EUR", "Europe/Paris")),
    **dict.fromkeys(("italy", "it", "italia"), ("EUR", "Europe/Rome")),
    **dict.fromkeys(("spain", "es"), ("EUR", "Europe/Madrid")),
    **dict.fromkeys(("netherlands", "nl"), ("EUR", "Europe/Amsterdam")),
    **dict.fromkeys(("china", "cn"), ("CNY", "Asia/Shanghai")),
    **dict.fromkeys(("japan", "jp"), ("JPY", "Asia/Tokyo")),
    **dict.fromkeys(("india", "in"), ("INR", "Asia/Kolkata")),
    **dict.fromkeys(("poland", "pl"), ("PLN", "Europe/Warsaw")),
    **dict.fromkeys(("switzerland", "ch"), ("CHF", "Europe/Zurich")),
    **dict.fromkeys(("united states", "usa", "us"), ("USD", None)),
    **dict.fromkeys(("brazil", "br", "brasil"), ("BRL", None)),
    **dict.fromkeys(("australia", "au"), ("AUD", None)),
    **dict.fromkeys(("canada", "ca"), ("CAD", None)),
}
"""Country -> its currency, and its zone where it has one."""


def plain(name: str) -> str:
    """Return a name in lower case, without blanks and signs."""
    return re.sub(r"[\W_]+", "", name.lower())
