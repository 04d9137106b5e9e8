package store

import "github.com/certmesh/certmesh/controlplane/internal/domain"

// batches are the methods that share commits.
type batches struct {
	open     *batch[domain.SessionOpen, domain.SessionOpened]
	closing  *batch[sessionClose, error]
	dispatch *batch[domain.Dispatch, error]
	accept   *batch[domain.Acceptance, error]
	fail     *batch[domain.Failure, domain.FailureOutcome]
	intents  *batch[domain.Intent, domain.IntentOutcome]
	issued   *batch[domain.Issued, domain.IssuedOutcome]
	complete *batch[domain.DeployResult, domain.DeployOutcome]
	orders   *batch[newOrder, orderOutcome]
}

func plain(err error) error { return err }

func (b *batches) start(s *Store) {
	b.open = &batch[domain.SessionOpen, domain.SessionOpened]{s: s, name: "session.open", run: s.openAll,
		key:  func(x domain.SessionOpen) string { return x.AgentID },
		fail: func(err error) domain.SessionOpened { return domain.SessionOpened{Err: err} }}
	b.closing = &batch[sessionClose, error]{s: s, name: "session.close", run: s.closeAll, fail: plain,
		key: func(x sessionClose) string { return x.agentID }}
	b.dispatch = &batch[domain.Dispatch, error]{s: s, name: "job.dispatch", run: s.dispatchAll, fail: plain,
		key: func(x domain.Dispatch) string { return x.JobID }}
	b.accept = &batch[domain.Acceptance, error]{s: s, name: "job.accept", run: s.acceptAll, fail: plain,
		key: func(x domain.Acceptance) string { return x.JobID }}
	b.fail = &batch[domain.Failure, domain.FailureOutcome]{s: s, name: "job.fail", run: s.failAll,
		key:  func(x domain.Failure) string { return x.JobID },
		fail: func(err error) domain.FailureOutcome { return domain.FailureOutcome{Err: err} }}
	// The database works on one transaction while the next is put together here.
	lanes := 1
	if s.d.name != nameSQLite {
		lanes = 2
	}
	b.intents = &batch[domain.Intent, domain.IntentOutcome]{s: s, name: "intent.record", run: s.intendAll, lanes: lanes,
		key:  func(x domain.Intent) string { return x.JobID },
		fail: func(err error) domain.IntentOutcome { return domain.IntentOutcome{Err: err} }}
	b.issued = &batch[domain.Issued, domain.IssuedOutcome]{s: s, name: "version.record", run: s.issueAll, lanes: lanes,
		key:  func(x domain.Issued) string { return x.JobID },
		fail: func(err error) domain.IssuedOutcome { return domain.IssuedOutcome{Err: err} }}
	b.complete = &batch[domain.DeployResult, domain.DeployOutcome]{s: s, name: "job.complete", run: s.completeAll,
		key:  func(x domain.DeployResult) string { return x.JobID },
		fail: func(err error) domain.DeployOutcome { return domain.DeployOutcome{Err: err} }}
	b.orders = &batch[newOrder, orderOutcome]{s: s, name: "certificate.create", run: s.orderAll, key: newOrder.key,
		fail: func(err error) orderOutcome { return orderOutcome{err: err} }}
}

func (b *batches) stop() {
	b.open.stop()
	b.closing.stop()
	b.dispatch.stop()
	b.accept.stop()
	b.fail.stop()
	b.intents.stop()
	b.issued.stop()
	b.complete.stop()
	b.orders.stop()
}
