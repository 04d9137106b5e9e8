// Package permit caps the calls toward each external issuer across the whole cluster.
package permit
