-- Rows that look like OpenCollective's, the same at each run: 10 hosts, 200 collectives and funds, 200 events and
-- projects below them, 300 people, and what they do. Every table counts its ids from 1.

INSERT INTO "Collectives" ("type", "slug", "name", "legalName", "isHostAccount", "settings", "createdAt", "updatedAt")
SELECT 'ORGANIZATION', 'host-' || i, 'Host ' || i, 'Host ' || i || ' Foundation, Inc.', true,
       jsonb_build_object('apply', i % 2 = 0, 'features', jsonb_build_object('virtualCards', i > 5)),
       timestamptz '2020-01-01 UTC' + i * interval '1 day', timestamptz '2024-01-01 UTC'
FROM generate_series(1, 10) i;

INSERT INTO "Collectives" ("type", "slug", "name", "description", "tags", "settings", "isPrivate", "HostCollectiveId", "createdAt", "updatedAt", "deletedAt")
SELECT CASE WHEN i % 10 = 0 THEN 'FUND' ELSE 'COLLECTIVE' END, 'collective-' || i, 'Collective ' || i,
       (ARRAY['We write open source', 'Mutual aid in our town', 'A festival of the arts', 'Für ein gutes Klima'])[i % 4 + 1],
       (ARRAY['{open source,javascript}', '{mutual aid}', '{arts,music}', NULL])[i % 4 + 1]::varchar[],
       CASE WHEN i % 3 > 0 THEN jsonb_build_object('lang', 'en', 'goals', jsonb_build_array(jsonb_build_object('amount', i * 100))) END,
       i % 20 = 7, i % 10 + 1,
       timestamptz '2021-01-01 UTC' + i * interval '1 hour', timestamptz '2024-01-01 UTC',
       CASE WHEN i % 25 = 11 THEN timestamptz '2024-02-02 UTC' END
FROM generate_series(1, 200) i;

INSERT INTO "Collectives" ("type", "slug", "name", "isPrivate", "HostCollectiveId", "ParentCollectiveId", "createdAt", "updatedAt")
SELECT CASE WHEN i % 2 = 0 THEN 'EVENT' ELSE 'PROJECT' END, 'child-' || i, 'Child ' || i, i % 30 = 5,
       p."HostCollectiveId", p."id",
       timestamptz '2022-01-01 UTC' + i * interval '1 hour', timestamptz '2024-01-01 UTC'
FROM generate_series(1, 200) i
JOIN "Collectives" p ON p."id" = 11 + i * 37 % 100;

INSERT INTO "Collectives" ("type", "slug", "name", "isPrivate", "createdAt", "updatedAt")
SELECT 'USER', 'user-' || i, 'User ' || i, i % 40 = 3,
       timestamptz '2021-06-01 UTC' + i * interval '1 hour', timestamptz '2024-01-01 UTC'
FROM generate_series(1, 300) i;

-- Collectives and their children have ids from 11 to 410, people from 411 to 710.

INSERT INTO "Tiers" ("CollectiveId", "slug", "name", "description", "amount", "currency")
SELECT 11 + i * 7 % 400, 'tier-' || i, (ARRAY['backer', 'sponsor', 'ticket'])[i % 3 + 1], 'Tier ' || i, i * 500,
       (ARRAY['USD', 'EUR'])[i % 2 + 1]
FROM generate_series(1, 300) i;

INSERT INTO "Orders" ("FromCollectiveId", "CollectiveId", "TierId", "status", "interval", "totalAmount", "currency", "description", "tags", "createdAt")
SELECT 411 + i * 13 % 300, t."CollectiveId", t."id", (ARRAY['PAID', 'ACTIVE', 'CANCELLED', 'PENDING'])[i % 4 + 1],
       CASE WHEN i % 4 = 1 THEN 'month' END, t."amount", t."currency", 'Contribution to ' || t."name",
       CASE WHEN i % 5 = 0 THEN '{import}'::varchar[] END, timestamptz '2023-01-01 UTC' + i * interval '1 hour'
FROM generate_series(1, 800) i
JOIN "Tiers" t ON t."id" = 1 + i * 11 % 300;

INSERT INTO "Expenses" ("FromCollectiveId", "CollectiveId", "type", "status", "description", "privateMessage", "tags", "currency", "createdAt")
SELECT 411 + i * 17 % 300, 11 + i * 3 % 400, (ARRAY['INVOICE', 'RECEIPT', 'GRANT'])[i % 3 + 1],
       (ARRAY['PAID', 'PENDING', 'APPROVED', 'DRAFT'])[i % 4 + 1], 'Expense ' || i, 'pay to account ' || i,
       (ARRAY['{design}', '{travel,food}', NULL])[i % 3 + 1]::varchar[], 'USD',
       timestamptz '2023-01-01 UTC' + i * interval '1 hour'
FROM generate_series(1, 1500) i;

INSERT INTO "ExpenseItems" ("ExpenseId", "amount", "description", "url")
SELECT 1 + i * 7 % 1500, 100 + i % 900, 'Item ' || i, 'https://files.example.org/' || i
FROM generate_series(1, 4000) i;

INSERT INTO "Transactions" ("TransactionGroup", "type", "kind", "amount", "currency", "hostCurrencyFxRate", "CollectiveId", "FromCollectiveId", "OrderId", "createdAt")
SELECT md5('order ' || o."id")::uuid, 'CREDIT', 'CONTRIBUTION', o."totalAmount", o."currency", 1 + o."id" / 1000.0,
       o."CollectiveId", o."FromCollectiveId", o."id", o."createdAt"
FROM "Orders" o
WHERE o."status" IN ('PAID', 'ACTIVE')
ORDER BY o."id";

INSERT INTO "Transactions" ("TransactionGroup", "type", "kind", "amount", "currency", "CollectiveId", "FromCollectiveId", "ExpenseId", "createdAt")
SELECT md5('expense ' || e."id")::uuid, 'DEBIT', 'EXPENSE', -100 * (e."id" % 50), e."currency",
       e."CollectiveId", e."FromCollectiveId", e."id", e."createdAt"
FROM "Expenses" e
WHERE e."status" = 'PAID'
ORDER BY e."id";

INSERT INTO "Updates" ("CollectiveId", "FromCollectiveId", "slug", "title", "html", "tags", "isPrivate", "publishedAt", "createdAt")
SELECT 11 + i * 9 % 400, 411 + i * 5 % 300, 'update-' || i, 'Update ' || i, '<p>News of the month, part ' || i || '</p>',
       CASE WHEN i % 3 = 0 THEN '{news}'::varchar[] END, i % 9 = 0,
       CASE WHEN i % 5 > 0 THEN timestamptz '2023-01-01 UTC' + i * interval '1 day' END,
       timestamptz '2023-01-01 UTC' + i * interval '1 day'
FROM generate_series(1, 400) i;

INSERT INTO "Comments" ("CollectiveId", "FromCollectiveId", "ExpenseId", "UpdateId", "html", "createdAt")
SELECT coalesce(e."CollectiveId", u."CollectiveId"), 411 + i * 19 % 300, e."id", u."id", '<p>Comment ' || i || '</p>',
       timestamptz '2023-02-01 UTC' + i * interval '1 hour'
FROM generate_series(1, 1500) i
LEFT JOIN "Expenses" e ON i % 3 > 0 AND e."id" = i
LEFT JOIN "Updates" u ON i % 3 = 0 AND u."id" = 1 + i % 400;

INSERT INTO "HostApplications" ("CollectiveId", "HostCollectiveId", "status", "message", "customData")
SELECT c."id", c."HostCollectiveId", (ARRAY['APPROVED', 'PENDING', 'REJECTED'])[i % 3 + 1], 'Please host us, we are ' || c."name",
       CASE WHEN i % 2 = 0 THEN jsonb_build_object('team', i) END
FROM generate_series(1, 150) i
JOIN "Collectives" c ON c."id" = 10 + i;

ANALYZE;
