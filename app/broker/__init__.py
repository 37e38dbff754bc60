"""The broker: the Celery app, its queues, the messages in them, and every key in Redis.

The row in Postgres is the truth; a message is a wake-up that may be lost, doubled or late.

Queues. `gristmill.<model>` for each configured model, and `broker.default_queue` ("celery") for
messages that name no queue; `gristmill.<model>@2` for jobs whose request is of format 2, and so
on, which only versions that read it take from. All hang on the anonymous exchange, whose routing
key is the queue's name: there are no bindings that FLUSHALL could lose.

Keys, in the one database the URL names, each after `broker.key_prefix`; kombu owns the layout.
The lists here are those of the default `broker.priority_steps` and `broker.sep`:

    <queue>                            list: waiting messages of priority 0 to 2; LPUSH, BRPOP, RPOP
    <queue>\\x06\\x163  \\x06\\x166  \\x06\\x169   lists: priorities 3 to 5, 6 to 8, and 9
    <queue>\\x06\\x16bell, <list>\\x06\\x16tags …, gristmill.weights   turns of tenants, see `lanes`
    gristmill.rates/…                  calls of tenants with a limit a minute: see `rates`
    unacked                            hash: delivery tag → [message, exchange, routing key] as JSON
    unacked_index                      sorted set: delivery tag by the second it was taken
    unacked_mutex                      lock of the worker that puts overdue messages back
    <uuid>.reply.celery.pidbox         list: answers to one `celery inspect` or `control`
    _kombu.binding.<exchange>          set: bindings of celery.pidbox, reply.celery.pidbox, celeryev
    _kombu.binding_permanent.<exchange>, _kombu.binding_deadlines     their upkeep
    /<db>.celery.pidbox, /<db>.celeryev/…     channels: remote control, events for Flower
    gristmill.events.<job id>          stream: what is told of a job while it runs, for those that
                                       ask for it; cut to `streams.MAX_ENTRIES`, kept for
                                       `streams.KEPT_S`; its entries are told of in `events`
    gristmill.events.wake.<uuid>       stream of one entry: ends the waiting read of one API process
    gristmill.cancels.<worker id>      channel: ids of that worker's jobs that were cancelled

Message. Celery protocol 2 as JSON, one element of the list:

    body              base64 of the UTF-8 JSON [[], {request}, {}]: no positional arguments, the
                      request body (and `url`, if it does not follow from the fields) as keyword
                      arguments, nothing embedded. {} as request: it is in the row, under the id
    content-type      "application/json"
    content-encoding  "utf-8"
    headers           {"lang": any text, "task": one of `message.TASKS`, as inference.generate,
                      "id": the job's UUID}; Celery's optional ones are honoured (eta, expires,
                      timelimit), "stream_events" is whether its tokens are told as they come,
                      "request_format" is that of the request, 1 if left out, and "more" are the
                      ids of further jobs that it wakes, "num_jobs" how many in all
    properties        {"delivery_tag": a new UUID every time, "body_encoding": "base64",
                      "delivery_info": {"exchange": "", "routing_key": the queue},
                      "priority": 0 to 9}

`message.raw_message` builds the smallest one accepted; `queues.Layout.key` names its list.
"""
