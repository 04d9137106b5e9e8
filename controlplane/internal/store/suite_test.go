package store_test

import (
	"testing"

	"github.com/certmesh/certmesh/controlplane/internal/store/storetest"
)

func TestMain(m *testing.M) { storetest.Main(m) }

func TestLesson7SuiteOnEveryEngine(t *testing.T) {
	t.Parallel()
	storetest.Each(t, func(t *testing.T, e storetest.Engine) { storetest.Exercise(t, e) })
}

func TestSuiteStumbling(t *testing.T) {
	t.Parallel()
	storetest.Each(t, storetest.ExerciseStumbling)
}
