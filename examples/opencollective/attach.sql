-- From here on eight indexes follow nine tables.

CREATE EXTENSION IF NOT EXISTS pg_es_sync;

SELECT es_sync.attach('"Collectives"', index => 'opencollective-collectives', document => '"CollectiveDocuments"',
    options => '{"mappings": {"properties": {"slug": {"type": "keyword"}, "type": {"type": "keyword"}}}}');

SELECT es_sync.attach('"Tiers"', index => 'opencollective-tiers', document => '"TierDocuments"');

SELECT es_sync.attach('"Orders"', index => 'opencollective-orders', document => '"OrderDocuments"');

-- Items can be searched one by one: an item called lunch that cost 20, not lunch in one and 20 in another.
SELECT es_sync.attach('"Expenses"', index => 'opencollective-expenses', document => '"ExpenseDocuments"',
    options => '{"mappings": {"properties": {"items": {"type": "nested", "properties": {
        "description": {"type": "text"}, "amount": {"type": "long"}}}}}}');

SELECT es_sync.attach('"Transactions"', index => 'opencollective-transactions', document => '"TransactionDocuments"');

-- Drafts and private updates have no document. A condition could stand in the view as well.
SELECT es_sync.attach('"Updates"', index => 'opencollective-updates', document => '"UpdateDocuments"',
    filter => '"publishedAt" IS NOT NULL AND NOT "isPrivate"', exclude => '{isPrivate}');

SELECT es_sync.attach('"Comments"', index => 'opencollective-comments', document => '"CommentDocuments"');

SELECT es_sync.attach('"HostApplications"', index => 'opencollective-host-applications',
    document => '"HostApplicationDocuments"');
