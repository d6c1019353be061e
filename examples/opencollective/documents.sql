-- What is searched, as views. A row that its view does not return has no document.

-- Accounts that everybody may see, with host and parent. All documents are about one of these: turn a collective private,
-- or delete it softly, and its documents go, those of its children, and those of everything below.
CREATE VIEW "VisibleAccounts" AS
SELECT c."id", c."type", c."slug", c."name",
       c."HostCollectiveId", h."name" AS "hostName", h."slug" AS "hostSlug",
       c."ParentCollectiveId", p."name" AS "parentName", p."slug" AS "parentSlug"
FROM "Collectives" c
LEFT JOIN "Collectives" h ON h."id" = c."HostCollectiveId"
LEFT JOIN "Collectives" p ON p."id" = c."ParentCollectiveId"
WHERE c."deletedAt" IS NULL AND NOT c."isPrivate"
  AND p."deletedAt" IS NULL AND p."isPrivate" IS NOT TRUE;

CREATE VIEW "CollectiveDocuments" AS
SELECT a.*, c."legalName", c."description", c."tags", c."settings", c."isHostAccount", c."createdAt", c."updatedAt",
       (SELECT count(*) FROM "Collectives" child
        WHERE child."ParentCollectiveId" = c."id" AND child."deletedAt" IS NULL) AS "children",
       (SELECT coalesce(sum(i."amount"), 0)
        FROM "Expenses" e
        JOIN "ExpenseItems" i ON i."ExpenseId" = e."id" AND i."deletedAt" IS NULL
        WHERE e."CollectiveId" = c."id" AND e."deletedAt" IS NULL) AS "expensed"
FROM "Collectives" c
JOIN "VisibleAccounts" a ON a."id" = c."id";

CREATE VIEW "TierDocuments" AS
SELECT t."id", t."type", t."slug", t."name", t."description", t."amount", t."currency", t."createdAt",
       t."CollectiveId", a."name" AS "collectiveName", a."hostName", a."parentName",
       (SELECT count(*) FROM "Orders" o
        WHERE o."TierId" = t."id" AND o."status" = 'ACTIVE' AND o."deletedAt" IS NULL) AS "activeOrders"
FROM "Tiers" t
JOIN "VisibleAccounts" a ON a."id" = t."CollectiveId"
WHERE t."deletedAt" IS NULL;

CREATE VIEW "OrderDocuments" AS
SELECT o."id", o."status", o."interval", o."totalAmount", o."currency", o."description", o."tags", o."createdAt",
       o."TierId", t."name" AS "tierName",
       o."FromCollectiveId", f."name" AS "fromName",
       o."CollectiveId", a."name" AS "collectiveName", a."hostName", a."parentName"
FROM "Orders" o
JOIN "VisibleAccounts" a ON a."id" = o."CollectiveId"
LEFT JOIN "VisibleAccounts" f ON f."id" = o."FromCollectiveId"
LEFT JOIN "Tiers" t ON t."id" = o."TierId"
WHERE o."deletedAt" IS NULL;

CREATE VIEW "ExpenseDocuments" AS
SELECT e."id", e."type", e."status", e."description", e."tags", e."currency", e."createdAt",
       e."FromCollectiveId", f."name" AS "fromName",
       e."CollectiveId", a."name" AS "collectiveName", a."hostName", a."parentName",
       (SELECT sum(i."amount") FROM "ExpenseItems" i
        WHERE i."ExpenseId" = e."id" AND i."deletedAt" IS NULL) AS "amount",
       (SELECT jsonb_agg(jsonb_build_object('description', i."description", 'amount', i."amount") ORDER BY i."id")
        FROM "ExpenseItems" i
        WHERE i."ExpenseId" = e."id" AND i."deletedAt" IS NULL) AS "items"
FROM "Expenses" e
JOIN "VisibleAccounts" a ON a."id" = e."CollectiveId"
LEFT JOIN "VisibleAccounts" f ON f."id" = e."FromCollectiveId"
WHERE e."deletedAt" IS NULL;

CREATE VIEW "TransactionDocuments" AS
SELECT t."id", t."TransactionGroup", t."type", t."kind", t."amount", t."currency", t."hostCurrencyFxRate", t."createdAt",
       coalesce(o."description", e."description") AS "description",
       t."FromCollectiveId", f."name" AS "fromName",
       t."CollectiveId", a."name" AS "collectiveName", a."hostName", a."parentName"
FROM "Transactions" t
JOIN "VisibleAccounts" a ON a."id" = t."CollectiveId"
LEFT JOIN "VisibleAccounts" f ON f."id" = t."FromCollectiveId"
LEFT JOIN "Orders" o ON o."id" = t."OrderId"
LEFT JOIN "Expenses" e ON e."id" = t."ExpenseId"
WHERE t."deletedAt" IS NULL;

CREATE VIEW "UpdateDocuments" AS
SELECT u."id", u."slug", u."title", u."html", u."tags", u."isPrivate", u."publishedAt", u."createdAt",
       u."FromCollectiveId", f."name" AS "fromName",
       u."CollectiveId", a."name" AS "collectiveName", a."hostName", a."parentName"
FROM "Updates" u
JOIN "VisibleAccounts" a ON a."id" = u."CollectiveId"
LEFT JOIN "VisibleAccounts" f ON f."id" = u."FromCollectiveId"
WHERE u."deletedAt" IS NULL;

CREATE VIEW "CommentDocuments" AS
SELECT m."id", m."html", m."createdAt",
       m."ExpenseId", e."description" AS "expense",
       m."UpdateId", u."title" AS "update",
       m."FromCollectiveId", f."name" AS "fromName",
       m."CollectiveId", a."name" AS "collectiveName", a."hostName", a."parentName"
FROM "Comments" m
JOIN "VisibleAccounts" a ON a."id" = m."CollectiveId"
LEFT JOIN "VisibleAccounts" f ON f."id" = m."FromCollectiveId"
LEFT JOIN "Expenses" e ON e."id" = m."ExpenseId"
LEFT JOIN "Updates" u ON u."id" = m."UpdateId"
WHERE m."deletedAt" IS NULL AND e."deletedAt" IS NULL AND u."deletedAt" IS NULL AND u."isPrivate" IS NOT TRUE;

CREATE VIEW "HostApplicationDocuments" AS
SELECT r."id", r."status", r."message", r."customData", r."createdAt",
       r."HostCollectiveId", h."name" AS "appliedTo",
       r."CollectiveId", a."name" AS "collectiveName", a."hostName", a."parentName"
FROM "HostApplications" r
JOIN "VisibleAccounts" a ON a."id" = r."CollectiveId"
JOIN "Collectives" h ON h."id" = r."HostCollectiveId"
WHERE r."deletedAt" IS NULL;
